"""`torch.compile`: an adapter that comes late is seen, and nothing else is compiled again for it."""

import copy
import itertools

import pytest
import torch
from conftest import make_text_encoder, randomize
from support.families import text_output

import apt_diffusion as apt

SMALL = apt.APTConfig(num_prompts=6, rank=2)
BOTH = apt.APTConfig(num_prompts=6, rank=2, streams=["query", "context"])


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counting:
    """A compiled model, and how often it was compiled."""

    def __init__(self, model, run):
        self.graphs, self.model, self.run = 0, model, run
        self.compiled = torch.compile(model, backend=self.backend, fullgraph=True)

    def backend(self, module, inputs):
        self.graphs += 1
        return module.forward

    @torch.no_grad()
    def check(self):
        torch.testing.assert_close(self.run(self.compiled), self.run(self.model), rtol=1e-4, atol=1e-5)


class Attention(torch.nn.Module):
    """A cross-attention, small enough to be compiled in a moment."""

    def __init__(self):
        super().__init__()
        self.hidden_size = self.cross_attention_dim = 12
        self.to_q, self.to_v = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)

    def forward(self, hidden_states, encoder_hidden_states=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        scores = self.to_q(hidden_states) @ context.transpose(-1, -2)
        return scores.softmax(-1) @ self.to_v(context)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, states, context):
        states = states + self.attn1(states)
        return states + self.attn2(states, encoder_hidden_states=context)


class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, states, context):
        for block in self.blocks:
            states = block(states, context)
        return states


apt.register_architecture(apt.Architecture(("Toy",), r".*\.attn2", init="identity"))


def toy_output(model):
    generator = torch.Generator().manual_seed(0)
    return model(torch.randn(2, 5, 12, generator=generator), torch.randn(2, 4, 12, generator=generator))


def make(kind):
    torch.manual_seed(0)
    return (Toy().eval(), toy_output) if kind == "toy" else (make_text_encoder().eval(), text_output)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["toy", "text encoder"])
def test_only_the_model_that_changed_is_compiled_again(kind):
    model, run = make(kind)
    same_class = Counting(copy.deepcopy(model), run)
    other, other_run = make("text encoder" if kind == "toy" else "toy")
    changed, other = Counting(model, run), Counting(other, other_run)

    def function(x):
        return torch.sin(x) + 1

    calls = []
    compiled = torch.compile(function, backend=lambda m, i: calls.append(1) or m.forward)
    everything = (changed, same_class, other)
    for counting in everything:
        counting.check()
    compiled(torch.ones(3))
    before = [counting.graphs for counting in everything]
    with torch.no_grad():
        base = run(model)
    apt.add_apt(model, SMALL)
    randomize(model)
    for _ in range(2):
        for counting in everything:
            counting.check()
        compiled(torch.ones(3))
    with torch.no_grad():
        assert not torch.allclose(run(changed.compiled), base, atol=1e-4)
    assert changed.graphs > before[0] or same_class.graphs > before[1]  # the two may share graphs
    assert changed.graphs + same_class.graphs == before[0] + before[1] + 1
    assert other.graphs == before[2] and len(calls) == 1


@pytest.mark.slow
def test_every_attachment_after_a_compiled_call_is_seen():
    toy, run = make("toy")
    counting = Counting(toy, run)
    counting.check()
    context = apt.APTConfig(num_prompts=6, rank=2, streams=["context"])
    everywhere = apt.APTConfig(num_prompts=6, rank=2, target_modules=["attn1", "attn2"])
    outputs = []
    for number, config in enumerate((SMALL, context, everywhere, BOTH)):
        apt.add_apt(toy, config, str(number))
        randomize(toy, number)
        counting.check()
        with torch.no_grad():
            outputs.append(run(toy))
    assert all(not torch.allclose(a, b, atol=1e-4) for a, b in itertools.pairwise(outputs))
    for number in (2, 0, 1, 3):
        apt.remove_apt(toy, str(number))
        counting.check()


@pytest.mark.parametrize("first", [["query"], ["context"]])
def test_a_second_stream_is_seen(first):
    toy, run = make("toy")
    counting = Counting(toy, run)
    apt.add_apt(toy, apt.APTConfig(num_prompts=6, rank=2, streams=first), "a")
    randomize(toy)
    counting.check()
    apt.add_apt(toy, BOTH, "b")
    randomize(toy)
    apt.set_apt_adapters(toy, ["a", "b"])
    counting.check()
    apt.remove_apt(toy, "b")
    apt.set_apt_adapters(toy, "a")
    counting.check()


def test_removing_goes_back_to_the_graph_of_the_base():
    toy, run = make("toy")
    counting = Counting(toy, run)
    counting.check()
    graphs = counting.graphs
    for _ in range(3):
        apt.add_apt(toy, SMALL)
        apt.remove_apt(toy)
        counting.check()
    assert counting.graphs == graphs
    assert type(toy.blocks[0].attn2._modules) is type(toy._modules)


def test_compiled_blocks_and_functions_see_it():
    """Blocks that are compiled one by one, and a function around the model."""
    toy, run = make("toy")
    blocks = copy.deepcopy(toy)
    for block in blocks.blocks:
        block.compile(backend="eager", fullgraph=True)
    around = torch.compile(lambda *inputs: toy(*inputs), backend="eager")
    with torch.no_grad():
        before = run(toy)
        for model in (around, blocks):
            torch.testing.assert_close(run(model), before)
        for model in (toy, blocks):
            apt.add_apt(model, SMALL)
            randomize(model)
        after = run(toy)
        assert not torch.allclose(after, before, atol=1e-4)
        for model in (around, blocks):
            torch.testing.assert_close(run(model), after)


def test_an_attention_of_parameters_only():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden_size = 12
            self.weight = torch.nn.Parameter(torch.randn(12, 12))

        def forward(self, hidden_states):
            return hidden_states @ self.weight

    torch.manual_seed(0)
    model = torch.nn.Sequential(Attention(), Attention())
    counting = Counting(model, lambda m: m(torch.ones(1, 3, 12)))
    counting.check()
    apt.add_apt(model, apt.APTConfig(num_prompts=4, target_modules=["1"]))
    randomize(model)
    counting.check()
