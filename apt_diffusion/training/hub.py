"""Pushing a finished run to the hub: the repository is made before any work is done, so that errors come early."""

from pathlib import Path

UPLOADED = ["*.safetensors", "README.md", "samples/*.png", "loss.png", "losses.jsonl", "config.toml"]
UPLOADED += ["results.json", "answers.json", "metrics.png", "metrics.jsonl"]


def create_repository(repo_id: str, token: str | None) -> str:
    """Makes the repository, or finds it; returns its full name."""
    from huggingface_hub import create_repo

    try:
        return create_repo(repo_id, exist_ok=True, token=token).repo_id
    except Exception as error:  # the hub, the network and the login each fail with classes of their own
        raise ValueError(
            f"--push_to_hub: the repository {repo_id!r} cannot be made or written, so nothing was started: {error}. "
            "Log in with `hf auth login` or pass --hub_token, or train without --push_to_hub."
        ) from error


def upload(repo_id: str, folder: str | Path, token: str | None) -> None:
    """Uploads adapter, card, samples and loss; checkpoints stay here."""
    from huggingface_hub import upload_folder

    try:
        upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            token=token,
            commit_message="End of training",
            allow_patterns=UPLOADED,
            ignore_patterns=["checkpoint-*", ".*"],
        )
    except Exception as error:
        raise RuntimeError(f"The adapter is in {folder}, but uploading it to {repo_id!r} failed: {error}") from error
