"""The processor core: the named adapters of one attention module, mixed by weight, for the whole batch or per sample.

The core is a child of the attention module (`apt`; `apt_context` and `apt_text` for the other streams). A forward hook
(`hooks.py`) calls it with the attention's output and input; for people who manage diffusers processors themselves,
`APTAttnProcessor` does the same around an inner processor.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_names import Adapters
from .equation import ApproximatedPrompt, FoldedPrompt, correct
from .memo import Memo
from .offloading import onloaded
from .wrappers import unwrapped_name

# Of one sample in a batch: the base model, one adapter, or several with their weights.
Sample = str | Mapping[str, float] | None
Mix = list[tuple[str, float]]


class APTProcessorCore(nn.Module):
    """Maps `(O, X) -> Y` with the active adapters: `Y = O + Σ λ_i (Y_i − O)`, or with one mix per sample.

    Attributes:
        adapters: name -> [`ApproximatedPrompt`].
        query_sources: name -> `"hidden_states"` (X queries the prompts) or `"attn_output"` (O queries them).
        weights: name -> λ of the active adapters, in the order in which they were activated.
        scale: factor on every λ.
        enabled: `False` returns the attention's output unchanged.
        adapters_per_sample: per sample a name, `{name: λ}` for a mix, or `None` for the base model. A batch that is k
            times as long repeats them k times, as classifier-free guidance stacks it.
        keep_folded: keep what does not depend on the input between calls without gradients; see `prepared_apt`.
        full_name: name of the core in its model; set when attached.
        binding: which argument of the attention is X and which output is O; set when attached (`hooks.py`).
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.adapters = Adapters()
        self.query_sources: dict[str, str] = {}
        self.weights: dict[str, float] = {}
        self.scale = 1.0
        self.enabled = True
        self.adapters_per_sample: tuple[Sample, ...] | None = None
        self.keep_folded = False
        self.full_name = ""
        self.binding: Any = None
        self._memos: dict[Hashable, Memo] = {}
        self.register_load_state_dict_post_hook(_accept_part_of_base)

    def add(self, name: str, adapter: ApproximatedPrompt, query_source: str) -> None:
        """Adds an adapter, not active yet."""
        self.adapters[name] = adapter
        self.query_sources[name] = query_source

    def delete(self, name: str) -> None:
        """Takes an adapter out."""
        del self.adapters[name], self.query_sources[name]
        self.weights.pop(name, None)
        self._memos.clear()

    def forward(self, attn_output: Tensor, hidden_states: Tensor) -> Tensor:
        """`(O, X) -> Y`, all `(B, N, d)`, returned in the dtype of O; `equation.py` says what is computed in which."""
        if not self.enabled:
            return attn_output
        with torch.autocast(attn_output.device.type, enabled=False):
            if self.adapters_per_sample is not None:
                return self._forward_per_sample(attn_output, hidden_states, self.adapters_per_sample)
            return self._forward_shared(attn_output, hidden_states)

    def once(self, states: Tensor) -> Tensor:
        """`forward(states, states)`; with `keep_folded` cached for the same states over denoising steps."""
        active = [self.adapters[name] for name in self._names_in_use()]
        if not self._may_keep() or any(adapter.active_dropout for adapter in active):
            return self(states, states)
        parameters = [p for adapter in active for p in adapter.parameters()]
        return self._keep("context", lambda: self(states, states), [states, *parameters], self.memo_settings())

    def memo_settings(self) -> tuple:
        """Everything besides the tensors that decides the result of `forward`."""
        samples: tuple | None = self.adapters_per_sample and tuple(
            tuple(sample.items()) if isinstance(sample, Mapping) else sample for sample in self.adapters_per_sample
        )
        weights, sources = tuple(self.weights.items()), tuple(self.query_sources.items())
        return self.enabled, self.scale, weights, samples, sources

    def _names_in_use(self) -> list[str]:
        if self.adapters_per_sample is None:
            return list(self.weights)
        names = [name for sample in self.adapters_per_sample for name, _ in self._mix(sample)]
        return list(dict.fromkeys(names))

    def _forward_shared(self, attn_output: Tensor, hidden_states: Tensor) -> Tensor:
        corrected = attn_output
        for name, weight in self.weights.items():
            if weight * self.scale == 0:
                continue  # O bit for bit
            adapter = self.adapters[name]
            query = hidden_states if self.query_sources[name] == "hidden_states" else attn_output
            folded = self._fold(name, weight * self.scale, attn_output.dtype, attn_output.device)
            output = correct(attn_output, query, folded, adapter.activation, adapter.active_dropout)
            corrected = output if corrected is attn_output else corrected + (output - attn_output)
        return corrected

    def _forward_per_sample(self, attn_output: Tensor, hidden_states: Tensor, samples: tuple[Sample, ...]) -> Tensor:
        batch_size = attn_output.shape[0]
        if batch_size % len(samples):
            raise ValueError(f"A batch of {batch_size} cannot be shared out to {len(samples)} adapter names.")
        mixes = [self._mix(sample) for sample in samples] * (batch_size // len(samples))
        corrected = attn_output
        for turn in range(max(map(len, mixes))):  # the first adapter of every row, then the second of those with two
            rows_of_kind: dict[tuple, list[int]] = defaultdict(list)  # one batched product for adapters of one kind
            for row, mix in enumerate(mixes):
                if turn < len(mix):
                    rows_of_kind[self._kind(mix[turn][0])].append(row)
            for kind, rows in rows_of_kind.items():
                query_source, activation, dropout, _ = kind
                folded = self._stack((turn, *kind), [mixes[row][turn] for row in rows], attn_output)
                query = hidden_states if query_source == "hidden_states" else attn_output
                whole = len(rows) == batch_size
                index = None if whole else torch.tensor(rows, device=attn_output.device)
                own, query = (attn_output, query) if index is None else (attn_output[index], query[index])
                part = correct(own, query, folded, activation, dropout)
                if turn:
                    part = (corrected if index is None else corrected[index]) + (part - own)
                corrected = part if index is None else corrected.index_copy(0, index, part)
        return corrected

    def _mix(self, sample: Sample) -> Mix:
        """`(name, λ)` of the adapters that act on one sample here."""
        if sample is None:
            return []
        weights = {sample: self.weights.get(sample, 1.0)} if isinstance(sample, str) else sample
        mix = [(name, weight * self.scale) for name, weight in weights.items() if name in self.adapters]
        return [(name, weight) for name, weight in mix if weight != 0]

    def _kind(self, name: str) -> tuple[str, str, float, int]:
        """Adapters of one kind can be stacked: zero prompts pad a relu adapter exactly, but not a softmax one."""
        adapter = self.adapters[name]
        padded = 0 if adapter.activation == "relu" else len(adapter.prompts)
        return self.query_sources[name], adapter.activation, adapter.active_dropout, padded

    def _stack(self, key: Hashable, mix: Mix, like: Tensor) -> FoldedPrompt:
        """One adapter per row: keys and values `(B, p, d)`, scale `(B, 1, 1)`."""
        distinct = list(dict.fromkeys(name for name, _ in mix))
        computed = torch.promote_types(
            like.dtype, torch.float32
        )  # rounded after the weights, as for one adapter alone
        folds = [self._fold(name, 1.0, computed, like.device) for name in distinct]
        activation = self.adapters[distinct[0]].activation

        def stack() -> FoldedPrompt:
            index = torch.tensor([distinct.index(name) for name, _ in mix], device=like.device)
            keys = nn.utils.rnn.pad_sequence([fold.keys for fold in folds], batch_first=True)
            values = nn.utils.rnn.pad_sequence([fold.values for fold in folds], batch_first=True)
            scale = torch.stack([fold.scale for fold in folds]).unsqueeze(-1)
            folded = FoldedPrompt(keys[index], values[index], scale[index])
            if any(weight != 1 for _, weight in mix):
                weights = torch.tensor([weight for _, weight in mix], device=like.device, dtype=scale.dtype)
                folded = folded.weighted(weights.view(-1, 1, 1))
            return folded.in_precision(like.dtype, activation)

        return self._keep(("stack", key), stack, [fold.keys for fold in folds], (mix, like.dtype))

    def _fold(self, name: str, weight: float, dtype: torch.dtype, device: torch.device) -> FoldedPrompt:
        """`ApproximatedPrompt.fold` on `device`; an offloaded adapter may be on another one."""
        adapter = self.adapters[name]

        def fold() -> FoldedPrompt:
            with onloaded(adapter):
                return FoldedPrompt(*(tensor.to(device) for tensor in adapter.fold(dtype, weight)))

        return self._keep(name, fold, list(adapter.parameters()), (weight, dtype, device))

    def _may_keep(self) -> bool:
        # First: what a compiled graph does must not depend on `keep_folded`, which pipelines switch on and off.
        return not torch.compiler.is_compiling() and self.keep_folded and not torch.is_grad_enabled()

    def _keep(self, key: Hashable, compute: Any, tensors: list[Tensor], settings: Any) -> Any:
        """`compute()`; with `keep_folded` only if a tensor or a setting that it depends on has changed."""
        if not self._may_keep():
            return compute()
        return self._memos.setdefault(key, Memo()).get(compute, tensors, settings)

    # ControlNet and AnimateDiff build models from parts of another model's state dict and expect base weights there.
    # So the state dict of a part has no adapters, and can be loaded back; that of the whole model has them.

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As `nn.Module.state_dict`, for the whole model; nothing within the state of a part of the model."""
        if self._is_in_part(prefix):
            return OrderedDict() if destination is None else destination
        return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)

    def _is_in_part(self, prefix: str) -> bool:
        seen = unwrapped_name(prefix.removesuffix("."))
        return seen != "" and seen != self.full_name and self.full_name.endswith(f".{seen}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        self._loaded_as = prefix
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def set_keep_folded(self, keep_folded: bool) -> None:
        """Starts or ends keeping; at its end what was kept is freed."""
        self.keep_folded = keep_folded
        if not keep_folded:
            self._memos.clear()

    def kept(self) -> list[Any]:
        """The values that are kept at present."""
        return [memo.value for memo in self._memos.values()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "keep_folded": False, "_memos": {}}

    def extra_repr(self) -> str:
        """Settings for `repr`."""
        return f"hidden_size={self.hidden_size}, weights={self.weights}, enabled={self.enabled}"


def _accept_part_of_base(core: nn.Module, incompatible: Any) -> None:
    """After loading: the state of a part of the model has no adapters in it, and none are missing."""
    prefix = core.__dict__.pop("_loaded_as", "")
    if core._is_in_part(prefix):
        missing = incompatible.missing_keys
        own = [key for key in missing if key.startswith(prefix)]
        if len(own) == len(core.state_dict()):
            missing[:] = [key for key in missing if not key.startswith(prefix)]


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
