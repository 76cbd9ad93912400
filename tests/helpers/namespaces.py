"""A Ray cluster whose nodes have addresses of their own: one network namespace each, on a bridge of this machine.

Needs root, `ip` and `tc` (iproute2) and a kernel with network namespaces, veth and bridges; for links with delay
netem, for narrow ones tbf. The head runs outside of the namespaces, at the bridge's address.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ray_app.cluster.reachability import connection_error

RAY = str(Path(sys.executable).with_name("ray"))
NETWORK = "10.213.77"
PORT = 6379
START_S = 180.0


def available() -> str:
    """Why this machine cannot do it, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"ra{os.getpid()}"
    try:
        ip(f"netns add {name}")
        ip(f"link add {name}v type veth peer name {name}w")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        return f"ip (iproute2) cannot make a namespace and a veth pair here: {error}"
    finally:
        for words in (f"link delete {name}v", f"netns delete {name}"):
            with suppress(FileNotFoundError, subprocess.CalledProcessError):
                ip(words)
    return ""


def no_discipline(words: str) -> str:
    """Why this kernel cannot send by a queueing discipline such as `netem delay 1ms`, or nothing."""
    name = f"rq{os.getpid()}"
    ip(f"netns add {name}")
    try:
        tc(f"-n {name} qdisc add dev lo root {words}")
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stderr", b"").decode().strip() or error
        return f"tc (iproute2) cannot do `{words}` here: {output}"
    finally:
        ip(f"netns delete {name}")
    return ""


def ip(words: str) -> None:
    """`ip WORDS`."""
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


def tc(words: str) -> None:
    """`tc WORDS`."""
    subprocess.run(["tc", *words.split()], check=True, capture_output=True)


@dataclass(slots=True)
class Node:
    """A worker in a namespace, behind one link."""

    name: str
    """Of the namespace."""
    link: str
    """The link's end on the bridge."""
    address: str
    """Of the node."""
    process: "subprocess.Popen[bytes] | None" = None
    """`ray start --block`."""

    def cut(self) -> None:
        """Drop all packets silently."""
        ip(f"link set {self.link} nomaster")

    def repair(self, bridge: str) -> None:
        """It passes again."""
        ip(f"link set {self.link} master {bridge}")

    def send_by(self, words: str) -> None:
        """A queueing discipline at both ends of the link."""
        for where in (f"qdisc replace dev {self.link}", f"-n {self.name} qdisc replace dev eth0"):
            tc(f"{where} root {words}")

    def send_freely(self) -> None:
        """As before."""
        for where in (f"qdisc delete dev {self.link}", f"-n {self.name} qdisc delete dev eth0"):
            with suppress(subprocess.CalledProcessError):  # there is none
                tc(f"{where} root")


@dataclass(slots=True)
class Network:
    """The bridge, the head on it, and the workers."""

    folder: Path
    bridge: str
    nodes: list[Node] = field(default_factory=list)
    head: "subprocess.Popen[bytes] | None" = None

    @property
    def address(self) -> str:
        """HOST:PORT for RAY_ADDRESS."""
        return f"{NETWORK}.1:{PORT}"

    def start(self, node: Node) -> None:
        """Its raylet, as a supervisor of the node would start it, again too."""
        words = f"start --address={self.address} --node-ip-address={node.address} --num-cpus=1 --block"
        node.process = self.ray(
            f"{words} --object-store-memory=80000000", node.name, "ip", "netns", "exec", node.name
        )

    def ray(self, words: str, log: str, *before: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{log}.log").open("a") as out:
            return subprocess.Popen([*before, RAY, *words.split()], stdout=out, stderr=out, start_new_session=True)

    def alive(self) -> set[str]:
        """Addresses of the nodes that the head counts as alive."""
        code = "import ray,sys; ray.init(sys.argv[1], log_to_driver=False, logging_level='ERROR'); "
        code += "print(*[n['NodeManagerAddress'] for n in ray.nodes() if n['Alive']])"
        done = subprocess.run([sys.executable, "-c", code, self.address], capture_output=True, text=True, timeout=60)
        return set(done.stdout.split())

    def listens(self) -> None:
        """Until the head does: a worker that comes before it may never join."""
        until = time.monotonic() + START_S
        while connection_error(self.address):
            assert time.monotonic() < until, self.log_tails()
            time.sleep(0.1)

    def wait(self) -> None:
        """Until all nodes are there; one that did not come up in Ray's 30 s starts again."""
        until = time.monotonic() + START_S
        while not {node.address for node in self.nodes} <= self.alive():
            assert time.monotonic() < until, self.log_tails()
            for node in self.nodes:
                if node.process and node.process.poll() is not None:
                    self.start(node)
            time.sleep(0.5)

    def log_tails(self) -> str:
        """The end of each node's log."""
        return "\n".join(path.read_text()[-1000:] for path in sorted(self.folder.glob("*.log")))


@contextmanager
def network(num_workers: int = 2) -> Iterator[Network]:
    """The cluster; ended with its processes, namespaces and bridge."""
    number = os.getpid()
    with tempfile.TemporaryDirectory(prefix="ra") as folder:
        made = Network(Path(folder), f"rb{number}")
        try:
            ip(f"link add {made.bridge} type bridge")
            ip(f"address add {NETWORK}.1/24 dev {made.bridge}")
            ip(f"link set {made.bridge} up")
            words = f"start --head --node-ip-address={NETWORK}.1 --port={PORT} --num-cpus=0 --include-dashboard=false"
            made.head = made.ray(f"{words} --temp-dir={folder}/r --object-store-memory=80000000 --block", "head")
            for n in range(num_workers):
                node = Node(f"rn{number}-{n}", f"rv{number}-{n}", f"{NETWORK}.{11 + n}")
                made.nodes.append(node)
                ip(f"netns add {node.name}")
                ip(f"link add {node.link} type veth peer name eth0 netns {node.name}")
                ip(f"-n {node.name} address add {node.address}/24 dev eth0")
                ip(f"-n {node.name} link set lo up")
                ip(f"-n {node.name} link set eth0 up")
                ip(f"link set {node.link} master {made.bridge} up")
            made.listens()
            for node in made.nodes:
                made.start(node)
            made.wait()
            yield made
        finally:
            for process in (made.head, *(node.process for node in made.nodes)):
                end(process)
            for node in made.nodes:
                for words in (f"link delete {node.link}", f"netns delete {node.name}"):
                    with suppress(subprocess.CalledProcessError):
                        ip(words)
            with suppress(subprocess.CalledProcessError):
                ip(f"link delete {made.bridge}")


def end(process: "subprocess.Popen[bytes] | None") -> None:
    """SIGKILL to it and all that came of it."""
    if process is None:
        return
    with suppress(psutil.NoSuchProcess):
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
