#!/usr/bin/env python
"""Many adapters on one base model: the engine beside three simpler servers, at full load and under random arrivals.

    python benchmarks/serving.py
    python benchmarks/serving.py --steps 5 10 40 --adapters 8
    python benchmarks/serving.py --shapes sd15 --requests 16 --adapters 8 --steps 3 --rate 0

Servers, with the same adapters kept attached by the same rules; batches need pictures of as many steps:
- engine: continuous batching, each picture with its own adapter;
- one by one: the pipeline with a lock;
- per adapter: the requests that wait for the adapter of the oldest one, as one batch, to its end;
- mixed: whatever waits, as one batch with an adapter per picture, to its end.

Adapters are asked for by Zipf's law. Throughput: all requests at once, the servers in turn, `--rounds` times; latency:
requests arrive at random moments (Poisson), the same for all, at a share of the engine's throughput.
"""

import json
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import randomized, sd15_text_encoder, sd15_unet, sd15_vae
from _timing import arguments, machine, synchronize

import apt_diffusion as apt
from apt_diffusion import AdapterStore, StableDiffusionAPTPipeline
from apt_diffusion.api import cores_of
from apt_diffusion.io.atomic import write_text
from apt_diffusion.serving.engine import Engine
from apt_diffusion.serving.requests import ImageRequest
from apt_diffusion.serving.residents import Residents
from apt_diffusion.serving.vocabulary import Vocabulary

ZIPF = 1.1
Done = Callable[[], None]


@dataclass
class Settings:
    """What all servers draw, and with what."""

    steps: list[int]  # one of these for each picture, by chance
    size: int
    batch: int
    max_device_bytes: int


class EngineServer:
    """The engine."""

    def __init__(self, pipe: Any, store: AdapterStore, settings: Settings) -> None:
        self.engine = Engine(
            pipe, store, max_batch_size=settings.batch, max_queue=10**6, max_device_bytes=settings.max_device_bytes
        )

    def submit(self, request: ImageRequest, done: Done) -> None:
        self.engine.submit(request).add_done_callback(lambda ticket: (ticket.result(0), done()))

    def close(self) -> None:
        self.engine.close()


class BatchServer:
    """Takes requests of the queue by a rule, and draws them to their end before it looks again."""

    def __init__(self, pipe: Any, store: AdapterStore, settings: Settings, rule: Callable[[list], list]) -> None:
        self.pipe, self.settings, self.rule = pipe, settings, rule
        self.residents = Residents(pipe, store, settings.max_device_bytes, Vocabulary(pipe))
        self.waiting: deque[tuple[ImageRequest, Done]] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def submit(self, request: ImageRequest, done: Done) -> None:
        with self.changed:
            self.waiting.append((request, done))
            self.changed.notify()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closing)
                if not self.waiting:
                    return
                alike = [one for one in self.waiting if steps_of(one) == steps_of(self.waiting[0])]
                chosen = self.rule(alike)[: self.settings.batch]
                for one in chosen:
                    self.waiting.remove(one)
            self.draw([request for request, _ in chosen])
            for _, done in chosen:
                done()

    def draw(self, requests: list[ImageRequest]) -> None:
        taken = [self.residents.attach(*self.residents.fetch(next(iter(r.adapters)))) for r in requests]
        self.pipe(
            [request.prompt for request in requests],
            apt_adapter_names=[name for _, name in taken],
            generator=[torch.Generator().manual_seed(request.seed or 0) for request in requests],
            num_inference_steps=requests[0].num_inference_steps,
            guidance_scale=3.0,
            width=self.settings.size,
            height=self.settings.size,
        )
        for version, _ in taken:
            self.residents.release(version)

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()
        self.residents.clear()


def adapter_of(entry: tuple[ImageRequest, Done]) -> str:
    return next(iter(entry[0].adapters))


def steps_of(entry: tuple[ImageRequest, Done]) -> int | None:
    return entry[0].num_inference_steps


RULES: dict[str, Callable[[list], list]] = {
    "one by one": lambda waiting: waiting[:1],
    "per adapter": lambda waiting: [entry for entry in waiting if adapter_of(entry) == adapter_of(waiting[0])],
    "mixed": lambda waiting: waiting,
}


def server(name: str, *args: Any) -> Any:
    return EngineServer(*args) if name == "engine" else BatchServer(*args, RULES[name])


@dataclass
class Load:
    """Requests of one run, and when they come."""

    requests: list[ImageRequest]
    moments: list[float]
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, server: Any) -> "Load":
        left = threading.Semaphore(0)
        begun = time.perf_counter()
        for request, moment in zip(self.requests, self.moments, strict=True):
            time.sleep(max(0.0, begun + moment - time.perf_counter()))
            came = begun + moment

            def done(came: float = came) -> None:
                self.latencies.append(time.perf_counter() - came)
                left.release()

            server.submit(request, done)
        for _ in self.requests:
            left.acquire()
        synchronize()
        self.seconds = time.perf_counter() - begun
        return self

    def percentile(self, share: float) -> float:
        return float(np.percentile(self.latencies, share))


def make_load(count: int, adapters: int, settings: Settings, rate: float, seed: int) -> Load:
    """Requests for adapters by Zipf's law; `rate` per second, or all at once where it is 0."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, adapters + 1) ** ZIPF
    chosen = rng.choice(adapters, count, p=weights / weights.sum())
    requests = [
        ImageRequest(
            "a robot on a sand background", seed=index, adapters={f"adapter{number}": 1.0},
            num_inference_steps=int(steps), guidance_scale=3.0, width=settings.size, height=settings.size,
        )
        for index, (number, steps) in enumerate(zip(chosen, rng.choice(settings.steps, count), strict=True))
    ]  # fmt: skip
    moments = np.cumsum(rng.exponential(1 / rate, count)) if rate else np.zeros(count)
    return Load(requests, [float(moment) for moment in moments])


def make_pipeline(shapes: str, device: str) -> Any:
    pipe = StableDiffusionAPTPipeline.from_pretrained("miniature-emoji")
    if shapes == "sd15":
        parts = {"unet": sd15_unet(device), "text_encoder": sd15_text_encoder(device), "vae": sd15_vae(device)}
        pipe = StableDiffusionAPTPipeline(**pipe.components | parts, requires_safety_checker=False)
        pipe.tokenizer.model_max_length = 77
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def fill(pipe: Any, folder: Path, count: int) -> int:
    """Adapters of the default size with random values; returns the size of one."""
    apt.add_apt(pipe, adapter_name="adapter")
    for index in range(count):
        torch.manual_seed(index)
        for core in cores_of(pipe):
            randomized(core, "")
        pipe.save_apt_weights(folder / f"adapter{index}.safetensors", "adapter")
    pipe.unload_apt_weights()
    store = AdapterStore(folder)
    return sum(tensor.numel() * tensor.element_size() for tensor in store.get("adapter0").tensors.values())


def overhead(pipe: Any, store: AdapterStore, settings: Settings, rounds: int) -> dict[str, float]:
    """A full batch in the engine: its time beside that of bare passes of the same batch, and outside all models."""
    channels, cells = pipe.unet.config.in_channels, settings.size // pipe.vae_scale_factor
    sample = torch.randn(2 * settings.batch, channels, cells, cells, device=pipe.device)
    tokens = torch.randn(
        2 * settings.batch, pipe.tokenizer.model_max_length, pipe.unet.config.cross_attention_dim, device=pipe.device
    )
    passes, outside = [], []
    for _ in range(rounds):
        with torch.no_grad():
            pipe.unet(sample, 5, encoder_hidden_states=tokens)
            begun = time.perf_counter()
            for _ in range(sum(settings.steps)):
                pipe.unet(sample, 5, encoder_hidden_states=tokens)
            synchronize()
            bare = time.perf_counter() - begun
        alike = replace(settings, steps=[sum(settings.steps)])
        one = EngineServer(pipe, store, alike)
        make_load(settings.batch, 1, alike, 0, 0).run(one)
        before = one.engine.statistics()
        load = make_load(settings.batch, 1, alike, 0, 1).run(one)
        now = one.engine.statistics()
        one.close()
        in_passes = now["pass_seconds"] - before["pass_seconds"]
        in_models = in_passes + now["other_seconds"] - before["other_seconds"]
        passes.append(in_passes / bare)
        outside.append(load.seconds / in_models - 1)
    return {"passes / bare passes": statistics.median(passes), "outside models": statistics.median(outside)}


def row(adapters: int, name: str, throughput: dict[str, float], latencies: dict[str, tuple[float, float]]) -> str:
    share = throughput[name] / throughput["engine"]
    if not latencies:
        return f"| {adapters} | {name} | {throughput[name]:.2f} | {share:.2f} | | | |"
    (p50, p95), of_engine = latencies[name], latencies[name][1] / latencies["engine"][1]
    return f"| {adapters} | {name} | {throughput[name]:.2f} | {share:.2f} | {p50:.2f} | {p95:.2f} | {of_engine:.2f} |"


def main() -> None:
    parser = arguments(__doc__ or "", rounds=3)
    parser.add_argument("--shapes", choices=("miniature", "sd15"), default="miniature")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 200], help="numbers of adapters to measure")
    parser.add_argument("--resident", type=int, default=40, help="how many of them the model has room for")
    parser.add_argument("--requests", type=int, default=64, help="of each run")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, nargs="+", default=[15], help="of a picture: one of these, by chance")
    parser.add_argument(
        "--rate", type=float, default=0.8, help="arrivals, of the engine's throughput; 0: no latencies"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    pipe = make_pipeline(args.shapes, args.device)
    size = pipe.unet.config.sample_size * pipe.vae_scale_factor if args.shapes == "miniature" else 128
    results: dict[str, Any] = {"machine": machine(), "settings": vars(args)}
    with tempfile.TemporaryDirectory() as folder:
        one = fill(pipe, Path(folder), max(args.adapters))
        settings = Settings(args.steps, size, args.batch, args.resident * one)
        store = AdapterStore(folder, max_bytes=2 * args.resident * one)
        names = ["engine", *RULES]
        results["overhead"] = overhead(pipe, store, settings, args.rounds)
        print(results["overhead"])
        print("\n| adapters | server | pictures/s | of the engine's | p50 s | p95 s | p95 of the engine's |")
        print("|---|---|---|---|---|---|---|")
        for adapters in args.adapters:
            rates: dict[str, list[float]] = {name: [] for name in names}
            for number in range(args.rounds):
                for name in names:
                    running = server(name, pipe, store, settings)
                    make_load(args.batch, adapters, settings, 0, 99).run(running)  # warm
                    load = make_load(args.requests, adapters, settings, 0, number).run(running)
                    rates[name].append(args.requests / load.seconds)
                    running.close()
            throughput = {name: statistics.median(values) for name, values in rates.items()}
            latencies: dict[str, tuple[float, float]] = {}
            for name in names if args.rate else ():
                running = server(name, pipe, store, settings)
                rate = args.rate * throughput["engine"]
                load = make_load(2 * args.requests, adapters, settings, rate, 7).run(running)
                latencies[name] = load.percentile(50), load.percentile(95)
                running.close()
            results[str(adapters)] = {"pictures per second": rates, "p50 and p95 in seconds": latencies}
            for name in names:
                print(row(adapters, name, throughput, latencies))
    file = write_text(Path(args.output_dir) / f"serving_{args.shapes}.json", json.dumps(results, indent=2))
    print(f"\nWritten: {file}")


if __name__ == "__main__":
    main()
