"""Which way bytes go: pulled by the receiver, or moved by a communicator. Decided from what the actors can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from wavecast.runtime.errors import TransportUnavailable
from wavecast.runtime.layout.box import Box
from wavecast.runtime.layout.shard import Layout, Place
from wavecast.runtime.plan.reshard import ReshardPlan, routes_digest
from wavecast.runtime.plan.route import Route

__all__ = ("Ability", "Carriers", "PullRule", "choose_carriers", "part_routes")

#: A broadcast over NCCL brings each receiver 360 GB/s, a pull 390.
_BROADCAST_LOSS = 1.08

_NO_KERNELS = "Triton is missing on some actors: tensors are copied one by one"

_Dims = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ability:
    """
    What one actor can do.

    :ivar place: node and device of its shards
    :ivar unshared: why other processes of its node could not map its memory; empty when they can
    :ivar kernels: it can run the fused kernels
    """

    place: Place
    unshared: str = "it is host memory"
    kernels: bool = False


@dataclass(frozen=True, slots=True)
class Carriers:
    """
    The ways open to one group of actors.

    :ivar moved: ``"nccl"``, ``"ipc"`` or ``"gloo"``: how bytes go that are packed and unpacked
    :ivar pulls: pairs of sender and receiver of which the receiver may read the sender's memory
    :ivar kernels: packing and summing up are done by fused kernels
    :ivar reasons: why the faster ways were not taken, for the report
    :ivar unused: pairs as in ``pulls`` that are not to be used for weights
    :ivar owners: where NCCL moves and actors share GPUs: for each actor the one through which its GPU's bytes go; else
        empty
    """

    moved: str
    pulls: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    kernels: bool = False
    reasons: tuple[str, ...] = ()
    unused: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    owners: tuple[int, ...] = ()

    @property
    def boards(self) -> frozenset[tuple[int, int]]:
        """Pairs of which the second may read the first one's memory, whatever goes that way: its board does."""
        return self.pulls | self.unused


def choose_carriers(
    wanted: str,
    abilities: Sequence[Ability],
    *,
    refused: Collection[tuple[int, int]] = (),
    sending: Collection[int] | None = None,
) -> Carriers:
    """
    Return the ways open to actors of these ``abilities``.

    :param wanted: ``"auto"``: neighbours on one node pull, the rest goes over NCCL where every actor has a GPU of its
        own, else through shared memory of the GPUs on one node, else over NCCL by way of one actor a GPU, else over
        gloo. ``"nccl"``, ``"gloo"``: that alone. ``"ipc"``: pulls alone
    :param refused: pairs of which the sender's memory could not be shared, or not be mapped by the receiver
    :param sending: actors that may send; ``None``: any
    :raises TransportUnavailable: when what was asked for cannot serve these actors
    """
    places = [ability.place for ability in abilities]
    without = tuple(actor for actor, place in enumerate(places) if place.device == "cpu")
    shared = _shared_device(places)
    kernels = all(ability.kernels for ability in abilities)
    if wanted == "gloo":
        return Carriers("gloo")

    if wanted == "nccl":
        if without:
            raise TransportUnavailable("NCCL moves GPU memory, these actors' shards are in host memory", actors=without)

        if shared:
            raise TransportUnavailable("NCCL needs a GPU for each actor, these share one", actors=shared)

        unused, reasons = _find_pulls(abilities, frozenset(refused)) if kernels else (frozenset(), (_NO_KERNELS,))
        return Carriers("nccl", kernels=kernels, reasons=reasons, unused=unused)

    pulls, reasons = _find_pulls(abilities, frozenset(refused)) if not without and kernels else (frozenset(), ())
    one_node = len({place.node for place in places}) == 1
    if wanted == "ipc":
        if without:
            raise TransportUnavailable(
                "CUDA IPC shares GPU memory, these actors' shards are on the host", actors=without
            )

        if reasons or not one_node or not kernels:
            why = reasons[0] if reasons else "Triton is missing" if one_node else "the actors are on several nodes"
            raise TransportUnavailable(f"CUDA IPC cannot serve these actors: {why}")

        return Carriers("ipc", pulls, kernels)

    if without:
        return Carriers("gloo", reasons=() if len(without) == len(places) else ("some shards are in host memory",))

    if not kernels:
        reasons = (_NO_KERNELS,)
    elif not one_node:
        reasons = (*reasons, "the actors are on several nodes: no GPU's memory can be read from another node")

    if not shared:
        return Carriers("nccl", pulls, kernels, reasons)

    everyone = len(pulls) == len(places) * (len(places) - 1)
    if one_node and everyone:
        return Carriers("ipc", pulls, kernels, reasons)

    owners = _find_owners(places, pulls, range(len(places)) if sending is None else sending)
    if owners:
        client = next(actor for actor, owner in enumerate(owners) if owner != actor)
        through = f"actors {shared[0]} and {shared[1]} share a GPU: NCCL serves {client} through {owners[client]}"
        return Carriers("nccl", pulls, kernels, (*reasons, through), owners=owners)

    return Carriers("gloo", reasons=(*reasons, f"actors {shared[0]} and {shared[1]} share a GPU, which NCCL refuses"))


class PullRule:
    """
    Tells which routes are pulled: those of one receiver that may read the sender's memory, where the sender holds the
    bytes as they are to arrive.
    """

    def __init__(self, layouts: Sequence[Layout], carriers: Carriers) -> None:
        self._pulls = carriers.pulls
        self._as_is = [_held_as_is(layout) for layout in layouts] if carriers.pulls else []

    def __call__(self, route: Route) -> bool:
        return (
            len(route.receivers) == 1
            and (route.sender, route.receivers[0]) in self._pulls
            and self._as_is[route.sender].get(route.tensor) == route.dtype
        )

    def reasons(self, routes: Sequence[Route]) -> tuple[str, ...]:
        """Return why some of ``routes`` are not pulled although their receivers may read the sender's memory."""
        several: set[str] = set()
        altered: set[str] = set()
        for route in routes:
            if self._pulls.issuperset((route.sender, receiver) for receiver in route.receivers) and not self(route):
                (several if len(route.receivers) > 1 else altered).add(route.tensor)

        found = (
            f"tensors that go to several receivers at once: {len(several)}" if several else "",
            f"tensors that are cast or worked out as they are sent: {len(altered)}" if altered else "",
        )
        return tuple(filter(None, found))


def part_routes(plan: ReshardPlan, layouts: Sequence[Layout], carriers: Carriers) -> ReshardPlan:
    """
    Return ``plan`` with routes of several receivers made one each where that is as fast: then they can be pulled.

    A broadcast leaves its sender once, so it stays whole where the sender's port would else be the busiest by far; but
    where the receivers' ports are busy anyway, single pulls in turn use all ports at a link's full speed. What was
    parted goes to the sender that serves its receiver anyway, if that holds it and does not become the busiest by it.
    A receiver on the sender's own GPU takes no port: it pulls in any case.
    """
    if not carriers.pulls:
        return plan

    if carriers.owners:
        plan = _part_neighbours(plan, layouts, carriers)

    several = [route for route in plan.routes if len(route.receivers) > 1]
    if not several:
        return plan

    if carriers.moved == "nccl":
        whole, parted = Counter[int](), Counter[int]()
        for route in plan.routes:
            whole[route.sender] += route.nbytes
            parted[route.sender] += route.nbytes * len(route.receivers)
            for receiver in route.receivers:
                whole[receiver] += route.nbytes
                parted[receiver] += route.nbytes

        apart = all((route.sender, receiver) in carriers.pulls for route in several for receiver in route.receivers)
        if not apart or max(parted.values()) > _BROADCAST_LOSS * max(whole.values()):
            return plan

    routes = [
        route if len(route.receivers) == 1 else replace(route, receivers=(receiver,))
        for route in plan.routes
        for receiver in route.receivers
    ]
    moved = frozenset((route.tensor, route.offset, route.extent) for route in several)
    regrouped = tuple(_regroup(routes, moved, layouts, carriers.pulls))
    return replace(plan, routes=regrouped, digest=routes_digest(regrouped))


def _part_neighbours(plan: ReshardPlan, layouts: Sequence[Layout], carriers: Carriers) -> ReshardPlan:
    """Return ``plan`` with receivers on their sender's GPU that can pull set apart from others of the same route."""
    pulled, owners = PullRule(layouts, carriers), carriers.owners
    routes: list[Route] = []
    for route in plan.routes:
        alone = {each: replace(route, receivers=(each,)) for each in route.receivers}
        near = [each for each in route.receivers if owners[each] == owners[route.sender] and pulled(alone[each])]
        if not near or len(alone) == 1:
            routes.append(route)
            continue

        routes += [alone[each] for each in near]
        rest = tuple(each for each in route.receivers if each not in near)
        if rest:
            routes.append(replace(route, receivers=rest))

    return replace(plan, routes=tuple(routes), digest=routes_digest(routes))


def _regroup(
    routes: Sequence[Route],
    parted: Collection[tuple[str, _Dims, _Dims]],
    layouts: Sequence[Layout],
    pulls: Collection[tuple[int, int]],
) -> list[Route]:
    """Return ``routes`` with those ``parted`` moved to the sender that brings their receiver most, where that fits."""
    brought: dict[int, Counter[int]] = {}
    loads = Counter[int]()
    for route in routes:
        loads[route.sender] += route.nbytes
        brought.setdefault(route.receivers[0], Counter())[route.sender] += route.nbytes

    most = max(loads.values())
    heaviest = {
        receiver: max(found, key=lambda sender: (found[sender], -sender)) for receiver, found in brought.items()
    }
    held: dict[int, dict[str, list[Box]]] = {}
    for sender in set(heaviest.values()):
        boxes = held[sender] = {}
        for piece in layouts[sender].pieces:
            boxes.setdefault(piece.tensor, []).append(piece.box)

    regrouped: list[Route] = []
    for route in routes:
        other = heaviest[route.receivers[0]]
        if (
            other != route.sender
            and (other, route.receivers[0]) in pulls
            and (route.tensor, route.offset, route.extent) in parted
            and loads[other] + route.nbytes <= most
            and any(box.contains(route.box) for box in held[other].get(route.tensor, ()))
        ):
            loads[route.sender] -= route.nbytes
            loads[other] += route.nbytes
            route = replace(route, sender=other)

        regrouped.append(route)

    return regrouped


def _held_as_is(layout: Layout) -> dict[str, str]:
    """Return the dtype of each tensor that the actor holds as it is, in one dtype, with nothing to work out."""
    computed = frozenset(layout.computed)
    found: dict[str, str] = {}
    for piece in layout.pieces:
        known = found.setdefault(piece.tensor, piece.dtype)
        if known != piece.dtype or piece.tensor in computed:
            found[piece.tensor] = ""

    return found


def _find_pulls(
    abilities: Sequence[Ability], refused: frozenset[tuple[int, int]]
) -> tuple[frozenset[tuple[int, int]], tuple[str, ...]]:
    pulls: set[tuple[int, int]] = set()
    reasons: list[str] = []
    for sender, ability in enumerate(abilities):
        if ability.unshared:
            reasons.append(f"the memory of actor {sender} cannot be shared: {ability.unshared}")
            continue

        for receiver, other in enumerate(abilities):
            if receiver == sender or other.place.node != ability.place.node:
                continue

            if (sender, receiver) in refused:
                reasons.append(f"actor {receiver} cannot read the memory of actor {sender}")
            else:
                pulls.add((sender, receiver))

    return frozenset(pulls), tuple(reasons)


def _shared_device(places: Sequence[Place]) -> tuple[int, ...]:
    """Return the first two actors that share a device, or nothing."""
    first: dict[Place, int] = {}
    for actor, place in enumerate(places):
        if first.setdefault(place, actor) != actor:
            return first[place], actor

    return ()


def _find_owners(
    places: Sequence[Place], pulls: Collection[tuple[int, int]], sending: Collection[int]
) -> tuple[int, ...]:
    """
    Return for each actor the one through which its GPU's bytes can go, or nothing where a GPU has none such.

    It is the first one whose memory all others on the GPU can read: a trainer, where there is one, which has most to
    send. Whatever is sent by one of them may be read by any other.
    """
    together: dict[Place, list[int]] = {}
    for actor, place in enumerate(places):
        together.setdefault(place, []).append(actor)

    found: dict[Place, int] = {}
    for place, actors in together.items():
        lenders = [each for each in actors if all((each, other) in pulls for other in actors if other != each)]
        if not lenders or any(each in sending and each not in lenders for each in actors):
            return ()

        found[place] = lenders[0]

    # With a single GPU there is nothing for a port to do.
    return tuple(found[place] for place in places) if len(found) > 1 else ()
