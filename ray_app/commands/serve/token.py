"""`ray-app serve-token create`: add a bearer token to the endpoint's token file."""

from typing import Any

from rich.console import Console

from ray_app.config.serve import ServeTokenConfig
from ray_app.store.token_file import append_token


def run_serve_token_create(cfg: ServeTokenConfig) -> dict[str, Any]:
    """Add the token and return its secret. ConfigError: the name is taken or not allowed."""
    secret = append_token(cfg.token_file, cfg.name, cfg.scopes)
    return {"name": cfg.name, "scopes": list(cfg.scopes), "file": str(cfg.token_file), "secret": secret}


def render_serve_token_create(result: dict[str, Any], console: Console) -> None:
    """Print the secret, which is shown only once."""
    console.print(f"token '{result['name']}' ({', '.join(result['scopes'])}) added to {result['file']}")
    console.print(f"{result['secret']}", soft_wrap=True)
    console.print("The secret is not stored or shown again; send it as `Authorization: Bearer …`.")
