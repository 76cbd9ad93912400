"""cluster.yaml through Ray's own AWS code, before an EC2, IAM and S3 that are not there (moto's)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import config as ray_aws
from ray.autoscaler._private.aws import utils
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config

ROOT = Path(__file__).resolve().parents[2]
POLICIES = ROOT / "deploy" / "launcher" / "aws"
ROLES = {"ray-app-head": ("bucket", "head"), "ray-app-worker": ("bucket",)}
"""As docs/cluster.md makes them: inline policies of each."""


def policy(name: str) -> str:
    return (POLICIES / f"{name}.json").read_text().replace("BUCKET", "my-bucket")


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An account after the steps of docs/cluster.md that come before `ray up`."""
    monkeypatch.setenv("HOME", str(tmp_path))  # for the ssh key
    (tmp_path / ".ssh").mkdir()
    caches = (utils.resource_cache, utils.client_cache, ray_aws._get_subnets_or_die)
    with mock_aws():
        for cache in caches:
            cache.cache_clear()
        iam = boto3.client("iam")
        for role, policies in ROLES.items():
            iam.create_role(RoleName=role, AssumeRolePolicyDocument=policy("trust"))
            for name in policies:
                iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=policy(name))
            iam.create_instance_profile(InstanceProfileName=role)
            iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)
        yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("account")
def test_ray_starts_a_node_of_each_type_with_its_role_and_opens_ssh_alone() -> None:
    plan = ray_aws.bootstrap_aws(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))
    provider = AWSNodeProvider(plan["provider"], plan["cluster_name"])
    for name, kind in plan["available_node_types"].items():
        provider.create_node(kind["node_config"], {"ray-node-name": name}, 1)
    found: dict[str, Any] = {}
    ec2 = boto3.client("ec2", region_name=plan["provider"]["region"])
    for reservation in ec2.describe_instances()["Reservations"]:
        for instance in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
            found[tags["Name"]] = instance["IamInstanceProfile"]["Arn"].rpartition("/")[2]
    assert found == {
        name: f"ray-app-{'head' if name == 'head' else 'worker'}" for name in plan["available_node_types"]
    }
    (group,) = ec2.describe_security_groups(GroupNames=["ray-app"])["SecurityGroups"]
    ssh = [rule for rule in group["IpPermissions"] if rule.get("IpRanges")]
    assert [(rule["FromPort"], rule["ToPort"]) for rule in ssh] == [(22, 22)]
    (inside,) = (rule for rule in group["IpPermissions"] if not rule.get("IpRanges"))
    assert [pair["GroupId"] for pair in inside["UserIdGroupPairs"]] == [group["GroupId"]]


def test_a_role_may_use_one_bucket_and_the_head_may_hand_on_the_workers_role_alone() -> None:
    found = [statement for name in ("bucket", "head") for statement in json.loads(policy(name))["Statement"]]
    allowed = {action: s["Resource"] for s in found for action in [s["Action"]] if isinstance(action, str)}
    assert allowed == {"iam:PassRole": "arn:aws:iam::*:role/ray-app-worker"}
    objects = next(s for s in found if "s3:PutObject" in s["Action"])
    assert objects["Resource"] == "arn:aws:s3:::my-bucket/*"
    assert {"s3:GetObject", "s3:DeleteObject"} <= set(objects["Action"])
