"""The comparison of methods: what it chooses, keeps and shows; the trainers that it runs have tests of their own."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import methods as benchmark


def fake_run(job, output_dir):
    """More is better at 0.003; APT wins by a tenth; a seed adds a hundredth."""
    fake_run.jobs.append(job.name)
    accuracy = 0.5 + (0.1 if job.method == "apt" else 0) + 0.01 * job.seed - abs(job.rate - 0.003)
    metrics = {"accuracy": accuracy, "dev_accuracy": accuracy, "test_p_accuracy": accuracy - 0.2}
    return {"trained_parameters": 1000 if job.model == "vilt" else 2000, "metrics": metrics}


def test_it_chooses_rates_by_the_first_seed_and_shows_what_it_found(monkeypatch, tmp_path, capsys):
    fake_run.jobs = []
    monkeypatch.setattr(benchmark, "run", fake_run)
    flags = [
        "--tasks",
        "vqa",
        "nlvr2",
        "--methods",
        "apt",
        "lora",
        "--seeds",
        "0",
        "2",
        "--learning_rates",
        "1e-3",
        "3e-3",
    ]
    benchmark.main(["--output_dir", str(tmp_path), *flags])
    rows = json.loads((tmp_path / "methods.json").read_text())
    assert len(rows) == 2 * 2 * 2 * 2 and {row["learning_rate"] for row in rows} == {0.003}
    assert not any(name.endswith("0.001-2") for name in fake_run.jobs)
    table = (tmp_path / "methods.md").read_text()
    assert table in capsys.readouterr().out
    columns = "VQA accuracy, vilt | VQA accuracy, meter | NLVR2 test-P accuracy, vilt | NLVR2 test-P accuracy, meter"
    assert table.splitlines()[0] == f"| method | parameters | {columns} |"
    assert "| APT | 1,000 to 2,000 | **61.0 ± 1.4** | **61.0 ± 1.4** | **41.0 ± 1.4** | **41.0 ± 1.4** |" in table
    assert "| LoRA | 1,000 to 2,000 | 51.0 ± 1.4 |" in table
    assert (tmp_path / "methods.png").stat().st_size > 5000


def test_a_finished_run_is_not_run_again(monkeypatch, tmp_path):
    job = benchmark.Job("vqa", "vilt", "apt", 0.001, 0)
    folder = tmp_path / "runs" / "vqa-vilt-apt-0.001-0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"metrics": {"accuracy": 0.25}}')
    monkeypatch.setattr(benchmark, "data_folder", lambda *args: pytest.fail("it was run again"))
    assert benchmark.run(job, tmp_path)["metrics"] == {"accuracy": 0.25}


def test_every_task_names_flags_that_its_trainer_has(tmp_path):
    """Data folder and model are not looked at when a command line is read."""
    import importlib

    for name, task in benchmark.TASKS.items():
        flags = task.flags | {"model_name_or_path": "x", "data_dir": "y", "output_dir": tmp_path, task.seed_flag: 1}
        words = [word for key, value in flags.items() for word in benchmark.words_of(key, value)]
        script = task.script or name
        module = importlib.import_module(f"train_apt_{script}")
        args = module.parse_args(*([words] if script != "clip" else ["", words]))
        assert all(str(getattr(args, key.removeprefix("no-"))) for key in flags)
