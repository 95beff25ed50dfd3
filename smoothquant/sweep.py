"""The one loop over the layers of a model.

    hidden states <- embedding of all tokens
    for each layer:  read it -> run all sequences through it, while listeners hear its linears -> forget it

One layer and the hidden states of all sequences are in memory (`hidden.Hidden`; large states lie in mapped files). On a
GPU there is one layer, too, and a thread reads the next into pinned memory while it runs.
Sequences of one length go through a layer together (`batches`). A workspace keeps the hidden states and the results of
the listeners. An interrupted run continues at the layer where they were kept, and its results are those of an
uninterrupted run.

Several ranks share the batches: each has a run of them, with their hidden states in its memory. What listeners have
heard of a layer is put together before they leave it. A state is that of one process, and any number of ranks goes on
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from smoothquant import decoder
from smoothquant.ahead import ahead
from smoothquant.attention import patterns
from smoothquant.batches import Batch, batches_of, sequences_in, shared_batches
from smoothquant.embedding import Embedding
from smoothquant.errors import CheckpointError
from smoothquant.hidden import PREFIX, Hidden
from smoothquant.layers import FloatLayer, Layer, Stored, float_layer, pinned
from smoothquant.listener import Listener
from smoothquant.memory import UNLIMITED, Budget
from smoothquant.model import Model
from smoothquant.team import ALONE, Team
from smoothquant.workroom import Workroom

EMBEDDED = 256 << 20  # bytes of embeddings that are made at a time; each time reads the whole table
FLOAT = "float"  # the form of the stored layers

Progress = Callable[[int, int], None]  # (done, total) layers


class Sweep:
    """Sequences under way through the layers of a model. The caller gives it one layer after another.

    dtype: the dtype of the arithmetic. device: the device that runs layers. budget: for hidden states and batches.
    team: those that share the sequences.

    index: the index of the next layer. batches: those of this rank, whose tokens alone `hidden` has. sequences: the
    places of theirs. first: how many tokens the ranks before it have. tokens: how many all ranks have.
    """

    def __init__(
        self,
        model: Model,
        sequences: Sequence[Tensor],
        listeners: Sequence[Listener],
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        work: Workroom | None = None,
        budget: Budget = UNLIMITED,
        team: Team = ALONE,
    ) -> None:
        self.model, self.listeners, self.device = model, listeners, device
        self.budget, self.team = budget, team
        mine = shared_batches(sequences, team, budget)
        self.first = mine[0].rows.start if mine else 0
        self.sequences = sequences_in(mine, sequences)
        self.batches = [batch.behind(self.first) for batch in mine]
        forms, tokens = {FLOAT: dtype}, {FLOAT: self.batches[-1].rows.stop if mine else 0}
        for listener in listeners:
            forms |= listener.forms
            heard = max(
                (batch.rows.stop for batch in self.batches if self._begins_within(listener.tokens, batch)), default=0
            )
            tokens |= dict.fromkeys(listener.forms, heard)
        self.index, self._hearing, self.tokens = 0, list(listeners), sum(map(len, sequences))
        width, mappable = model.geometry.hidden_size, not team.linked
        self.hidden = Hidden(tokens, width, forms, work, budget.states, device, mappable=mappable)
        longest = max(map(len, sequences))
        self._patterns = {kind: patterns(model, longest, kind, device) for kind in dict.fromkeys(forms.values())}
        self._sequences = sequences

    def embed(self, embedding: Embedding | None = None) -> None:
        """Compute the input of the first layer. embedding: in place of the model's own."""
        mine = slice(self.first, self.first + self.hidden.tokens[FLOAT])
        ids = torch.cat(list(self._sequences))[mine]
        positions = torch.cat([torch.arange(len(sequence)) for sequence in self._sequences])[mine]
        embeddings = dict.fromkeys(self.hidden.forms, embedding or Embedding(self.model))
        for listener in self.listeners:
            if listener.embedding:
                embeddings |= dict.fromkeys(listener.forms, listener.embedding)
        dtype = self.hidden.forms[FLOAT]
        room = EMBEDDED if self.budget.states is None else min(EMBEDDED, self.budget.states // 8)
        step = max(1, room // (self.hidden.before(0, FLOAT).shape[1] * dtype.itemsize))
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            found = {
                one: one.embed(ids[part][None], dtype, positions[part][None])[0] for one in set(embeddings.values())
            }
            for form, one in embeddings.items():
                states = self.hidden.before(0, form)[part]
                states.copy_(found[one][: len(states)])
            self.hidden.release()

    def states(self, sequence: int, form: str = FLOAT) -> Tensor:
        """The hidden states of one sequence of this rank before layer `index`, (tokens, hidden)."""
        start = sum(map(len, self._sequences[:sequence])) - self.first
        return self.hidden.before(self.index, form)[start : start + len(self._sequences[sequence])]

    def whole(self) -> None:
        """Give every rank the hidden states before layer `index` of all sequences: it goes on alone."""
        if not self.team.linked:
            return
        rows = {form: self.team.rows_of_all(self.hidden.before(self.index, form)) for form in self.hidden.forms}
        tokens = {form: len(states) for form, states in rows.items()}
        self.hidden = Hidden(tokens, self.model.geometry.hidden_size, self.hidden.forms)
        self.hidden.restore({PREFIX + form: states for form, states in rows.items()})
        self.batches, self.first, self.team = list(batches_of(self._sequences, self.budget)), 0, ALONE
        self.sequences = range(len(self._sequences))

    def outputs(self) -> Iterator[Tensor]:
        """Yield the hidden states before layer `index` of this rank's batches, (tokens, hidden)."""
        for batch in self.batches:
            yield self.hidden.before(self.index, FLOAT)[batch.rows]

    @torch.no_grad()
    def layer(self, source: Stored) -> None:
        """Run all sequences through one layer. Listeners hear float layers alone."""
        running: dict[str, Layer] = {FLOAT: replace(source.to(self.device), listen=self._listen)}
        for listener in self.listeners:
            assert isinstance(source, FloatLayer)
            running |= listener.enter(source)
        for batch in self.batches:
            self._hearing = [one for one in self.listeners if self._begins_within(one.tokens, batch)]
            forms = {FLOAT, *(form for listener in self._hearing for form in listener.forms)}
            made = {form: self._run(layer, form, batch) for form, layer in running.items() if form in forms}
            for listener in self._hearing:
                listener.advance(made)
            self.hidden.release()
        for listener in self.listeners:
            listener.merge(self.team)
            listener.leave()
            if listener.leftover:
                raise CheckpointError(
                    f"layer {source.index}: statistics of {', '.join(listener.leftover)} that belong to no matrix",
                    expected="linears that the checkpoint holds",
                    do="correct the family record",
                )
        self.index = source.index + 1

    @torch.no_grad()
    def hear(self, source: FloatLayer, tokens: int | None = None) -> None:
        """Let the listeners hear all sequences in a float layer, whose weights are widened once; or the first batches,
        which hold at least so many tokens. The hidden states stay before it."""
        self._hearing = list(self.listeners)
        for listener in self.listeners:
            listener.enter(source)
        layer = replace(source.to(self.device, self.hidden.forms[FLOAT]), listen=self._listen)
        for batch in self.batches:
            if not self._begins_within(tokens, batch):
                break
            self._after(layer, FLOAT, batch)
        for listener in self.listeners:
            listener.merge(self.team)
            listener.leave()

    @torch.no_grad()
    def take(self, layer: Layer) -> None:
        """Run all sequences through a layer of any kind, to which nobody listens."""
        for batch in self.batches:
            after = self._after(layer, FLOAT, batch, heard=False)
            self.hidden.before(layer.index + 1, FLOAT)[batch.rows] = after.flatten(0, 1)
        self.index = layer.index + 1

    def state(self) -> dict[str, Tensor]:
        """The hidden states before the next layer and the results of the listeners, by name; rank 0 has those of all
        ranks."""
        kept = {name: self.team.rows_at_lead(rows) for name, rows in self.hidden.state(self.index).items()}
        for number, listener in enumerate(self.listeners):
            kept |= {f"{number}.{name}": values for name, values in listener.state().items()}
        return kept

    def restore(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Continue before layer `index` from the `state` there, which rank 0 has. Raises KeyError if entries are
        missing or left over."""
        left = dict(state)
        rows = {}
        for form in () if self.hidden.mapped else self.hidden.forms:
            whole = left.pop(PREFIX + form) if self.team.leads else None
            rows[PREFIX + form] = self.team.rows_from_lead(whole, self.hidden.before(index, form))
        self.hidden.restore(rows)
        left = self.team.same(left)
        for number, listener in enumerate(self.listeners):
            theirs = {name: left.pop(name) for name in list(left) if name.startswith(f"{number}.")}
            taken = {name.partition(".")[2]: values for name, values in theirs.items()}
            listener.restore(taken)
            left |= taken
        if left:
            raise KeyError(*left)
        self.index = index

    def _begins_within(self, tokens: int | None, batch: Batch) -> bool:
        """Whether a batch begins within so many of the first tokens; None for all."""
        return tokens is None or self.first + batch.rows.start < tokens

    def _run(self, layer: Layer, form: str, batch: Batch) -> Tensor:
        after = self._after(layer, form, batch, heard=form == FLOAT)
        self.hidden.before(layer.index + 1, form)[batch.rows] = after.flatten(0, 1)
        return after

    def _after(self, layer: Layer, form: str, batch: Batch, *, heard: bool = True) -> Tensor:
        """The output of a layer for one batch, (sequences, tokens, hidden). heard: by the listeners, too."""
        before = self.hidden.before(layer.index, form)[batch.rows]
        positions = self._patterns[self.hidden.forms[form]].upto(batch.length)
        states = before.view(-1, batch.length, before.shape[-1]).to(self.device)
        return decoder.forward(self.model, layer, states, positions, *((self._hear,) if heard else ()))

    def _listen(self, role: str, x: Tensor, y: Tensor) -> None:
        for listener in self._hearing:
            listener.listen(role, x, y)

    def _hear(self, residual: Tensor) -> None:
        for listener in self._hearing:
            listener.residual(residual)


@torch.no_grad()
def sweep(
    model: Model,
    sequences: Sequence[Tensor],
    listeners: Sequence[Listener] = (),
    *,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
    device: str = "cpu",
    work: Workroom | None = None,
    team: Team = ALONE,
    keep_last: bool = False,
    budget: Budget = UNLIMITED,
    stored: Callable[[int], Stored] | None = None,
    progress: Progress = lambda done, total: None,
) -> Sweep:
    """Run sequences of token ids through all layers of a model. Returns the sweep after the last layer.

    weights: the dtype that layers are read in; None keeps the dtype on disk and widens weights when they are used.
    work: the workspace that keeps the state when it is due, and after the last layer if `keep_last`. An interrupted
        sweep continues from it. Mapped files need no copy: each finished layer is noted.
    budget: what may be in memory; with one, a layer's matrices are read whenever they are used.
    team: those that share the sequences; all call this.
    stored: a function that reads a layer; None reads float layers.

    Raises OutputError if the disk has no room for the hidden states, CheckpointError for statistics that a listener
    cannot assign to a matrix.
    """
    layers, start = model.geometry.layers, work.next_layer if work else 0
    under_way = Sweep(model, sequences, listeners, dtype=dtype, device=device, work=work, budget=budget, team=team)
    if work and start:
        under_way.restore(start, work.state())
    else:
        under_way.embed()
    progress(start, layers)
    with closing(_read(model, weights, device, budget, stored, range(start, layers))) as sources:
        for source in sources:
            under_way.layer(source)
            del source  # before the next is there
            done = under_way.index
            if work and (keep_last if done == layers else under_way.hidden.mapped or work.due):
                work.mark(done, under_way.state())
            progress(done, layers)
    return under_way


def _read(
    model: Model,
    weights: torch.dtype | None,
    device: str,
    budget: Budget,
    stored: Callable[[int], Stored] | None,
    indices: range,
) -> Generator[Stored, None, None]:
    """Yield layers, on the CPU. While a GPU runs one, the next is read, unless a budget has slices read when they are
    used."""

    def layer(index: int) -> Stored:
        return stored(index) if stored else float_layer(model, index, weights, numbers=budget.numbers)

    if device == "cpu" or budget.numbers is not None:
        yield from map(layer, indices)
    else:
        yield from ahead(lambda index: pinned(layer(index)), indices)
