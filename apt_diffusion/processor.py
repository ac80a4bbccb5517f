"""The processor core: the named adapters of one attention module, and the two ways to call it.

The core is child `apt` of the attention module. A forward hook (`apply_apt`) hands it the attention's output and
input; for people who manage diffusers processors themselves, `APTAttnProcessor` does the same around an inner one.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .equation import ApproximatedPrompt, FoldedPrompt, correct
from .offloading import onloaded

T = TypeVar("T")


class APTProcessorCore(nn.Module):
    """Maps `(O, X) -> Y` with the active adapters: `Y = O + Σ λ_i (Y_i − O)`, or one adapter per sample.

    Attributes:
        adapters: name -> [`ApproximatedPrompt`].
        query_sources: name -> `"hidden_states"` (X asks the prompts) or `"attn_output"` (O asks them).
        weights: name -> λ of the active adapters, in the order in which they were activated.
        scale: factor on every λ.
        enabled: `False` leaves the attention alone.
        adapters_per_sample: one name (or `None` for the base model) per sample. A batch that is k times as long
            repeats the names k times, as classifier-free guidance stacks it.
        keep_folded: keep what does not depend on the input between calls without gradients; see `prepared_apt`.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.adapters = nn.ModuleDict()
        self.query_sources: dict[str, str] = {}
        self.weights: dict[str, float] = {}
        self.scale = 1.0
        self.enabled = True
        self.adapters_per_sample: tuple[str | None, ...] | None = None
        self.keep_folded = False
        self._folded: dict[Hashable, tuple[list, Any, list[Tensor]]] = {}

    def add(self, name: str, adapter: ApproximatedPrompt, query_source: str) -> None:
        self.adapters[name] = adapter
        self.query_sources[name] = query_source

    def delete(self, name: str) -> None:
        del self.adapters[name], self.query_sources[name]
        self.weights.pop(name, None)
        self._folded.clear()

    def forward(self, attn_output: Tensor, hidden_states: Tensor) -> Tensor:
        """`(O, X) -> Y`, all `(B, N, d)`; computed in float32 or better, returned in the dtype of O."""
        if not self.enabled:
            return attn_output
        with torch.autocast(attn_output.device.type, enabled=False):
            if self.adapters_per_sample is not None:
                return self._forward_per_sample(attn_output, hidden_states, self.adapters_per_sample)
            return self._forward_shared(attn_output, hidden_states)

    def once(self, states: Tensor) -> Tensor:
        """`forward(states, states)`; with `keep_folded` once for the same states, not once per denoising step."""
        names = self.adapters_per_sample or tuple(self.weights)
        active = [self.adapters[name] for name in dict.fromkeys(names) if name in self.adapters]
        if any(adapter.active_dropout for adapter in active):
            return self(states, states)
        parameters = [p for adapter in active for p in adapter.parameters()]
        settings = (self.enabled, self.scale, tuple(self.weights.items()), self.adapters_per_sample)
        return self._keep(("context",), lambda: self(states, states), states, settings, *parameters)

    def _forward_shared(self, attn_output: Tensor, hidden_states: Tensor) -> Tensor:
        corrected = attn_output
        for name, weight in self.weights.items():
            if weight * self.scale == 0:
                continue  # O bit for bit
            adapter = self.adapters[name]
            query = hidden_states if self.query_sources[name] == "hidden_states" else attn_output
            folded = self._fold(name, weight * self.scale, attn_output)
            output = correct(attn_output, query, folded, adapter.activation, adapter.active_dropout)
            corrected = output if corrected is attn_output else corrected + (output - attn_output)
        return corrected

    def _forward_per_sample(self, attn_output: Tensor, hidden_states: Tensor, names: tuple[str | None, ...]) -> Tensor:
        batch_size = attn_output.shape[0]
        if batch_size % len(names):
            raise ValueError(f"A batch of {batch_size} cannot be shared out to {len(names)} adapter names.")
        rows: dict[tuple, list[int]] = defaultdict(list)  # one batched product for all adapters of one kind
        for row, name in enumerate(names * (batch_size // len(names))):
            if name in self.adapters:
                rows[self._kind(name)].append(row)
        names = names * (batch_size // len(names))
        corrected = attn_output
        for (query_source, activation, _), kind_rows in rows.items():
            folded = self._stack([names[row] for row in kind_rows], attn_output)
            query = hidden_states if query_source == "hidden_states" else attn_output
            if len(kind_rows) == batch_size:
                return correct(attn_output, query, folded, activation)
            index = torch.tensor(kind_rows, device=attn_output.device)
            part = correct(attn_output[index], query[index], folded, activation)
            corrected = corrected.index_copy(0, index, part)
        return corrected

    def _kind(self, name: str) -> tuple[str, str, int]:
        """Adapters of one kind can be stacked: zero prompts pad a relu adapter exactly, but not a softmax one."""
        adapter = self.adapters[name]
        padded = 0 if adapter.activation == "relu" else len(adapter.prompts)
        return self.query_sources[name], adapter.activation, padded

    def _stack(self, names: list[str], like: Tensor) -> FoldedPrompt:
        """One adapter per row: keys and values `(B, p, d)`, scale `(B, 1, 1)`."""
        distinct = list(dict.fromkeys(names))
        folds = [self._fold(name, self.weights.get(name, 1.0) * self.scale, like) for name in distinct]

        def stack() -> FoldedPrompt:
            index = torch.tensor([distinct.index(name) for name in names], device=like.device)
            keys = nn.utils.rnn.pad_sequence([fold.keys for fold in folds], batch_first=True)
            values = nn.utils.rnn.pad_sequence([fold.values for fold in folds], batch_first=True)
            scale = torch.stack([fold.scale for fold in folds]).unsqueeze(-1)
            return FoldedPrompt(keys[index], values[index], scale[index])

        return self._keep(("stack", *self._kind(names[0])), stack, names, *(fold.keys for fold in folds))

    def _fold(self, name: str, weight: float, like: Tensor) -> FoldedPrompt:
        """`ApproximatedPrompt.fold` for activations such as `like`; an offloaded adapter may be on another device."""
        adapter = self.adapters[name]
        dtype = torch.promote_types(like.dtype, torch.float32)

        def fold() -> FoldedPrompt:
            with onloaded(adapter):
                return FoldedPrompt(*(tensor.to(like.device) for tensor in adapter.fold(dtype, weight)))

        return self._keep(name, fold, (weight, dtype, like.device), *adapter.parameters())

    def _keep(self, key: Hashable, compute: Callable[[], T], *depends_on: Any) -> T:
        """`compute()`; with `keep_folded` only when something that it depends on, tensor or plain, has changed."""
        # First: what a compiled graph does must not depend on `keep_folded`, which pipelines switch on and off.
        if torch.compiler.is_compiling() or not self.keep_folded or torch.is_grad_enabled():
            return compute()
        if any(isinstance(part, Tensor) and part.is_inference() for part in depends_on):
            return compute()  # such tensors do not count their changes
        state = [(p, p._version, p.data_ptr()) if isinstance(p, Tensor) else p for p in depends_on]
        known, value, _ = self._folded.get(key, (None, None, None))
        if known is None or not _same_state(known, state):
            value = compute()
            # Holding on to the storages keeps their addresses from being given to other values.
            storages = [part.detach() for part in depends_on if isinstance(part, Tensor)]
            self._folded[key] = (state, value, storages)
        return value

    def set_keep_folded(self, keep_folded: bool) -> None:
        self.keep_folded = keep_folded
        if not keep_folded:
            self._folded.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "keep_folded": False, "_folded": {}}

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, weights={self.weights}, enabled={self.enabled}"


def check_name(adapter_name: str) -> None:
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"An adapter name is a non-empty string without dots, got {adapter_name!r}.")
    if hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(f"{adapter_name!r} is a method of torch modules and cannot name an adapter.")


def _same_state(known: list, state: list) -> bool:
    return len(known) == len(state) and all(map(_same, known, state))


def _same(known: Any, part: Any) -> bool:
    if isinstance(part, tuple) and isinstance(part[0], Tensor):  # by identity: `==` on tensors is elementwise
        return isinstance(known[0], Tensor) and known[0] is part[0] and known[1:] == part[1:]
    return known == part


# Hooks. They are module-level functions that read the module's children: a closure over the core would make
# `copy.deepcopy` share the original's weights, and could not be pickled.


def apply_apt(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: corrects the attention's output, the first entry where it is a tuple."""
    hidden_states = args[0] if args else kwargs["hidden_states"]
    if isinstance(output, tuple):
        return (module.apt(output[0], hidden_states), *output[1:])
    return module.apt(output, hidden_states)


def apply_apt_context(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Forward pre-hook: corrects the encoder states c (O := c, X := c) before they become keys and values."""
    if len(args) > 1:
        return (args[0], _correct_context(module.apt_context, args[1]), *args[2:]), kwargs
    context = kwargs.get("encoder_hidden_states")
    return args, {**kwargs, "encoder_hidden_states": _correct_context(module.apt_context, context)}


def _correct_context(core: APTProcessorCore, context: Any) -> Any:
    if isinstance(context, tuple):  # IP-Adapter: (text states, image states)
        return (_correct_context(core, context[0]), *context[1:])
    return context if context is None else core.once(context)


class APTAttnProcessor(nn.Module):
    """A diffusers attention processor that applies a processor core around any `inner` processor.

    Same numbers as the hook of `add_apt`. Its limits are those of every diffusers processor: attention slicing,
    `set_attn_processor` and `fuse_qkv_projections` replace it without a word, `set_default_attn_processor` raises, and
    IP-Adapters cannot be loaded on top. It corrects the query stream only. Prefer `add_apt`.

    Args:
        core: the adapters of this attention module.
        inner: a stock processor (`attn.processor`), called first.
    """

    def __init__(self, core: APTProcessorCore, inner: Any) -> None:
        super().__init__()
        self.apt = core
        self.inner = inner

    # Named arguments: `Attention.forward` drops every keyword that it does not find in the signature of `__call__`.
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_adapter_masks: list[Tensor] | None = None,
    ) -> Tensor:
        extra = {} if ip_adapter_masks is None else {"ip_adapter_masks": ip_adapter_masks}
        output = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb, **extra)
        return self.apt(output, hidden_states)
