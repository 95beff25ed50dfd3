"""A checkpoint seen through its family: every tensor accounted for, read part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from smoothquant import layout
from smoothquant.artifacts.manifest import ModelFacts
from smoothquant.checkpoint import Checkpoint, Part, TensorInfo
from smoothquant.config import Config
from smoothquant.errors import CheckpointError, UserError
from smoothquant.family import Family, Geometry
from smoothquant.family_checks import check_numbers, check_record
from smoothquant.norms import Norm
from smoothquant.quantization import is_finite
from smoothquant.roles import ROUTER, Role, parsed

ROWS = 2048  # rows of an embedding or lm_head handed over at a time
BESIDE = (("q", "k", "v"), ("gate", "up"))  # roles that read one input in any decoder


class Model:
    """One checkpoint with its family record and its numbers.

    config: the config.json, under today's names, with the keys that the record reads marked as read.
    family: the record of this checkpoint's layout. length: the longest sequence that is wanted, by which LongRoPE's
        frequencies are chosen; None: the short ones.
    roles: of all linears of a layer, the router's included.
    groups: smoothing groups, every expert's linears spelled out.
    choices: what makes another model of the same checkpoint, for manifests: the positions for which its rotary
        frequencies hold, where they were chosen by `length`; else nothing.
    stored: matrices of a layer as they lie on disk: name within the layer -> roles of the linears in it.

    Raises CheckpointError when the config lacks a number or contradicts the weights: a tensor is missing, has another
    shape, or is one that the family does not know.
    """

    def __init__(self, checkpoint: Checkpoint, family: Family, length: int | None = None) -> None:
        self.checkpoint = checkpoint
        content = family.modern(checkpoint.config) if family.modern else checkpoint.config
        self.config = Config(content, where=f"{checkpoint.folder}/config.json")
        try:
            self.family = family.variant(self.config) if family.variant else family
            numbers = self.family.geometry(self.config)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint.folder}/config.json: cannot read the numbers of a {family.name} ({error!r})",
                expected=f"the keys of a {family.architectures[0]}",
                do="restore the config.json that came with the weights",
            ) from error
        check_record(self.family)
        check_numbers(self.family, numbers, f"{checkpoint.folder}/config.json")
        self.geometry: Geometry = self._upto(numbers, length)
        self.choices = {"max_positions": self.geometry.max_positions} if numbers.short_positions else {}
        self.roles = self.family.roles(self.geometry)
        self.groups = self.family.expanded(self.geometry)
        self.stored = self.family.stored(self.geometry)
        self._unpack()
        self._check_tensors()

    # -- names ---------------------------------------------------------------------------------------------------

    @property
    def quantized_roles(self) -> tuple[str, ...]:
        """Roles of the linears that get quantized: all but the router."""
        return tuple(role for role in self.roles if role != ROUTER)

    @property
    def expert_modules(self) -> frozenset[str]:
        """Module names of all experts."""
        roles = [role for role in self.quantized_roles if parsed(role).expert is not None]
        layers = range(self.geometry.layers)
        return frozenset(self.linear(layer, role).rpartition(".")[0] for layer in layers for role in roles)

    @property
    def inputs(self) -> tuple[tuple[str, ...], ...]:
        """Roles of the linears that read the same input, together: ("q", "k", "v"), ("o",), ("gate", "up"), ("down",).
        Every quantized linear is in one; a router is with the experts."""
        shared = {role: self._beside(role) for role in self.quantized_roles}
        shared |= {role: group.linears for group in self.groups for role in group.linears}
        return tuple(dict.fromkeys(shared[role] for role in self.quantized_roles))

    @property
    def side_by_side(self) -> tuple[tuple[str, ...], ...]:
        """Roles of the quantized linears that engines put into one matrix: those that read one input, each expert's
        apart."""
        found: dict[tuple[int, int | None], list[str]] = {}
        for number, roles in enumerate(self.inputs):
            for role in roles:
                if role != ROUTER:
                    found.setdefault((number, parsed(role).expert), []).append(role)
        return tuple(map(tuple, found.values()))

    def _beside(self, role: str) -> tuple[str, ...]:
        """A linear and those that read its input, whether or not something can be folded into it."""
        kind, expert = parsed(role).kind, parsed(role).expert
        kinds = next((kinds for kinds in BESIDE if kind in kinds), (kind,))
        return tuple(one for one in (Role(each, expert) for each in kinds) if one in self.roles)

    def linear(self, layer: int, role: str) -> str:
        """Module name of a linear: linear(0, "q") -> "model.layers.0.self_attn.q_proj"."""
        return self.family.module(layer, self.family.linear(role))

    def norm(self, layer: int, role: str) -> str:
        """Module name of a layer's norm: norm(0, "mlp") -> "model.layers.0.post_attention_layernorm"."""
        return self.family.module(layer, self.family.norms[role])

    def linears(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Module name and (out, in) of every matrix that gets quantized, as it lies on disk, in order."""
        for layer in range(self.geometry.layers):
            for name, roles in self.stored.items():
                if roles != (ROUTER,):
                    shapes = [self.family.shape(role, self.geometry) for role in roles]
                    yield self.family.module(layer, name), (sum(out for out, _ in shapes), shapes[0][1])

    def float_linears(self) -> tuple[str, ...]:
        """Module names of the linears that stay in float: the output head, routers, projections."""
        family, layers = self.family, self.geometry.layers if ROUTER in self.roles else 0
        projections = tuple(name for name in (family.project_in, family.project_out) if name)
        return (family.lm_head, *projections, *(self.linear(layer, ROUTER) for layer in range(layers)))

    @property
    def lm_head(self) -> str:
        """Name of the tensor that the logits are computed with: the embedding's where they are tied."""
        return f"{self.family.embedding if self.geometry.tied_embeddings else self.family.lm_head}.weight"

    def facts(self) -> ModelFacts:
        """What those who run an export must know of the model, for its manifest. cache_window: newest keys that any
        layer looks at, None if that is all of them."""
        geometry = self.geometry
        windows = [kind.window for kind in geometry.attention]
        bounded = [window for window in windows if window is not None]
        everywhere = len(bounded) == len(windows) and self.family.alibi is None
        return ModelFacts(
            hidden_size=geometry.hidden_size,
            layers=geometry.layers,
            heads=geometry.heads,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            vocab_size=geometry.vocab_size,
            max_positions=geometry.max_positions,
            cache_window=max(bounded) if everywhere else None,
        )

    # -- reading -------------------------------------------------------------------------------------------------

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies, by its full name, which the checkpoint may hold without its first part."""
        return self.checkpoint.tensors[self.on_disk(name)]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows, in the dtype it has on disk; CheckpointError, naming it, if it holds NaN or
        Inf."""
        return self._finite(name, self.checkpoint.read(self.on_disk(name), rows))

    def rows(self, name: str, step: int = ROWS) -> Iterator[Tensor]:
        """A large tensor, `step` rows at a time, checked like `read`."""
        for start in range(0, self.info(name).shape[0], step):
            yield self.read(name, slice(start, start + step))

    def norm_at(self, name: str) -> Norm:
        """The norm with this module name."""
        kind = self.family.norm
        return Norm(kind, self.read(f"{name}.weight"), self.read(f"{name}.bias") if kind == "layer" else None)

    def lookup(self, name: str, ids: Tensor) -> Tensor:
        """Rows of a large tensor. ids: (...) int64; returns (..., channels) in the dtype on disk."""
        unique, where = torch.unique(ids, return_inverse=True)
        info = self.info(name)
        found = torch.empty(len(unique), info.shape[1], dtype=info.dtype)
        for part, rows in enumerate(self.rows(name)):
            start = part * ROWS
            inside = (unique >= start) & (unique < start + len(rows))
            found[inside] = rows[unique[inside] - start]
        return found[where]

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Rows of a matrix on disk, or numbers per row, by role. name: within the layer."""
        return layout.split(self.family, self.geometry, name, tensor)

    def role_rows(self, role: str) -> layout.RoleRows:
        """Where the rows of a role lie in its matrix on disk."""
        return layout.role_rows(self.family, self.geometry, role)

    def join(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`."""
        return layout.join(self.family, self.geometry, name, parts)

    def on_disk(self, name: str) -> str:
        """The name that a tensor has in the checkpoint."""
        return name if name in self.checkpoint.tensors else name.removeprefix(self.family.base)

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not is_finite(tensor):
            raise CheckpointError(
                f"{self.info(name).file}: tensor {name} holds NaN or Inf",
                expected="finite weights",
                do="download this file again, or ask who trained the model",
            )
        return tensor

    def _unpack(self) -> None:
        """Look at other forms on disk as if they were the family's own."""
        tensors = self.checkpoint.tensors
        for layer in range(self.geometry.layers if self.family.packed else 0):
            for name, roles in self.family.packed.items():
                full = self.on_disk(self.family.module(layer, name))
                if full in tensors and tensors[full].shape == self._packed_shape(roles):
                    self.checkpoint.view(full, dict(self._parts(layer, full, roles)))

    def _packed_shape(self, roles: tuple[str, ...]) -> tuple[int, ...]:
        experts = (self.geometry.experts,) if "{}" in self.family.linears[roles[0]] else ()
        shapes = [self.family.shape(role, self.geometry) for role in roles]
        return (*experts, sum(out for out, _ in shapes), shapes[0][1])

    def _parts(self, layer: int, full: str, roles: tuple[str, ...]) -> Iterator[tuple[str, Part]]:
        for index in range(self.geometry.experts) if "{}" in self.family.linears[roles[0]] else (None,):
            start = 0
            for role in roles:
                stop = start + self.family.shape(role, self.geometry)[0]
                name = self.linear(layer, Role(role, index))
                yield f"{name}.weight", Part(full, index, slice(start, stop))
                start = stop

    def _upto(self, numbers: Geometry, length: int | None) -> Geometry:
        if length is not None and not 0 < length <= numbers.max_positions:
            raise UserError(
                f"--max-length {length}",
                expected=f"1 to {numbers.max_positions}, this model's positions by its config.json",
            )
        return numbers.upto(length)

    # -- checks --------------------------------------------------------------------------------------------------

    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the family and the config call for."""
        return self.family.tensors(self.geometry)

    def _check_tensors(self) -> None:
        found, expected = self.checkpoint.tensors, self.expected()
        restore = "check that config.json and the weights belong to the same model"
        for name, shape in expected.items():
            if self.on_disk(name) not in found:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: tensor {name} is missing", expected=f"shape {list(shape)}", do=restore
                )
            info = self.info(name)
            if info.shape != shape:
                raise CheckpointError(
                    f"{info.file}: tensor {name} has shape {list(info.shape)}",
                    expected=f"{list(shape)} by config.json",
                    do=restore,
                )
        head = f"{self.family.lm_head}.weight"
        for name in found.keys() - {self.on_disk(name) for name in expected}:
            if name.endswith(".bias") and not self.checkpoint.read(name).any():  # it adds nothing
                continue
            if name == f"{self.family.lm_head}.bias":
                raise CheckpointError(
                    f"{found[name].file}: the output head has a bias ({name})",
                    expected="a head without one, as in every family that can be exported",
                    do="there is no way to export this model yet",
                )
            if name != head or not self.geometry.tied_embeddings:
                raise CheckpointError(
                    f"{found[name].file}: tensor {name} is not part of a {self.family.name} with this config.json",
                    do=restore,
                )
            self._check_tied(head)

    def _check_tied(self, head: str) -> None:
        """A head that a checkpoint holds beside the embedding it is tied to: all rows must be the same."""
        embedding = f"{self.family.embedding}.weight"
        same = self.checkpoint.tensors[head].shape == self.info(embedding).shape
        pairs = zip(self.rows(head), self.rows(embedding), strict=True)
        same = same and all(torch.equal(a.float(), b.float()) for a, b in pairs)
        if not same:
            raise CheckpointError(
                f"{self.checkpoint.tensors[head].file}: tensor {head} is not {embedding}, and config.json ties them",
                expected="the same numbers, or tie_word_embeddings: false",
                do="restore the config.json that came with the weights",
            )
