"""Plays one world from its seed to its end."""

import gc
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import msgspec

from ledger.books import TENANT
from ledger.memory_holders import MemoryLedger
from simulation.database import Database
from simulation.judge import Judge
from simulation.plan import END_S, GRACE_S, TTL_S, FaultName, Faults, Plan, crowd_for, plan_for
from simulation.remembered import Disk
from simulation.request import Asked
from simulation.sidecar import Parts, SimulatedGateway
from simulation.world import Process, World, WrongError

Size = Literal["small", "crowd"]

CALM = Faults()
CALM_AFTER_S = 3.0
"""After the last incident the world has no more faults."""
REST_EACH_S = 1.0


class Outcome(msgspec.Struct, kw_only=True):
    """How a run ended."""

    seed: int
    steps: int
    trace: str
    wrong: list[str]
    requests: int
    statements: int
    outcomes: dict[str, int]
    incidents: dict[str, int]


class Pod:
    """A place where one sidecar after the other lives, with a disk."""

    def __init__(self, simulation: "Simulation", number: int) -> None:
        self.simulation = simulation
        self.number = number
        self.disk = Disk()
        self.lives = 0
        self.lost_disk_next = False
        self.process: Process
        self.gateway: SimulatedGateway
        self.asked: list[Asked] = []
        self.start()

    def start(self) -> None:
        """A new process."""
        simulation = self.simulation
        self.lives += 1
        if self.lost_disk_next:
            self.disk = Disk()
            self.lost_disk_next = False
        process = self.process = Process(simulation.world, f"pod-{self.number}.{self.lives}")  # type: ignore[abstract]
        process.on_killed = self._killed
        self.asked = [asked for asked in self.asked if not simulation.is_told(asked)]
        self.gateway = SimulatedGateway(
            process, simulation.database, self.disk, simulation.asked_by_name, simulation.parts
        )
        self.gateway.on_stopped = self._stopped
        simulation.world.note(f"{process.name} starts")
        process.call_soon(lambda: process.create_task(self.gateway.run(), name="process"))

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is left to do here."""
        gateway = self.gateway
        return self.process.alive and gateway.is_serving and not gateway.live and not gateway.writer.backlog

    def _killed(self) -> None:
        self._is_gone()
        self.simulation.world.after(self.simulation.world.random.uniform(0.0, 6.0), self.start)

    def _is_gone(self) -> None:
        """What is not settled yet is settled from the journal, as far as that is there and whole."""
        for asked in self.asked:
            if not asked.ended or not self.simulation.is_told(asked):
                asked.killed = True
                asked.forgotten |= self.lost_disk_next or self.simulation.disk_was_full

    def lose(self) -> None:
        """The node is gone, with its disk; whether or not somebody lives there at the moment."""
        self.lost_disk_next = True
        if self.process.alive:
            self.simulation.kill(self)
        else:
            self._is_gone()

    def _stopped(self) -> None:
        self.simulation.world.note(f"{self.process.name} has ended")
        self._is_gone()
        self.simulation.world.after(self.simulation.world.random.uniform(0.1, 2.0), self.start)


class Simulation:
    """One world."""

    def __init__(
        self,
        plan: Plan,
        *,
        parts: Parts | None = None,
        ledger: Callable[[Callable[[], float]], MemoryLedger] = MemoryLedger,
        told: Callable[[str], None] | None = None,
    ) -> None:
        self.plan = plan
        self.parts = parts or Parts()
        self.world = World(plan.seed, told=told)
        self.ledger = ledger(lambda: self.world.wall_s)
        self.database = Database(self.world, self.ledger, plan.faults, plan.latency_s)
        self.asked: dict[Any, Asked] = {}
        self.asked_by_name: dict[str, Asked] = {}
        self.judge = Judge(self.ledger, self.asked, overshoot_is_zero=plan.provider_keeps_its_word)
        self.database.after = self._after_statement
        self.statements = 0
        self.disk_was_full = False
        self._keeper_since_s = self.world.wall_s
        self._keeper_life = 0
        self.incidents: dict[str, int] = {}
        self.limits = self._limits()
        self.suspended = False
        for name in self.limits:
            self._put(name)
        self.pods = [Pod(self, number) for number in range(plan.sidecars)]
        self._schedule()

    def is_told(self, asked: Asked) -> bool:
        """Whether the books have its end from its sidecar; a policy only guesses."""
        hold = self.ledger.holds.get((TENANT, asked.request_id))
        return hold is not None and hold.state not in ("open", "suspense", "charged_by_policy")

    # --- the course of things ----------------------------------------------------------------------------------

    def _schedule(self) -> None:
        plan, world = self.plan, self.world
        for number in range(plan.requests):
            world.after(world.random.uniform(0.2, 0.2 + plan.arrivals_s), self._ask, number)
        for when_s, name in plan.incidents:
            world.after(when_s, self._incident, name)
        self._last_s = max([plan.arrivals_s + 0.2, *(when_s for when_s, _ in plan.incidents)])
        world.after(self._last_s + CALM_AFTER_S, self._calm)
        world.after(plan.keeper_interval_s, self._keep)

    def _ask(self, number: int) -> None:
        world = self.world
        serving = [pod for pod in self.pods if pod.gateway.is_serving and pod.process.alive]
        if not serving:
            return
        pod = world.random.choice(serving)
        asked = Asked(number, self.plan.seed, self.plan.faults, world.now_s)
        self.asked[asked.request_id] = self.asked_by_name[str(asked.request_id)] = asked
        pod.asked.append(asked)
        world.note(f"request {number} ({asked.request_id}) goes to {pod.process.name}")
        pod.process.arrives(0.0, pod.gateway.serve, asked)

    def _keep(self) -> None:
        """What `Keeper` does in a round, on a session that began when the database did."""
        world, ledger, database = self.world, self.ledger, self.database
        if database.is_up:
            if self._keeper_life != database.life:
                self._keeper_life, self._keeper_since_s = database.life, world.wall_s
            report = ledger.reap_v1(200, self._keeper_since_s)
            charged = ledger.charge_by_policy_v1(timedelta(seconds=GRACE_S), self.plan.policy)
            if report["fenced"] or report["holds"] or charged:
                world.note(f"the keeper: {report}, charged {[str(row['request_id']) for row in charged]}")
                self._after_statement("keeper")
        world.after(self.plan.keeper_interval_s, self._keep)

    def _after_statement(self, _name: str) -> None:
        self.statements += 1
        self.judge.look()

    def _calm(self) -> None:
        """No more faults; the budgets are as they were."""
        self.database.faults = CALM
        self._rest()

    def _rest(self) -> None:
        """The end, once nothing is open, nobody lives and nothing is on its way to the books."""
        is_open = any(hold.state in ("open", "suspense") for hold in self.ledger.holds.values())
        is_leased = any(lease.free for leases in self.ledger.leases.values() for lease in leases.values())
        if not is_open and not is_leased and all(pod.is_at_rest for pod in self.pods):
            self.world.is_over = True
        self.world.after(REST_EACH_S, self._rest)

    # --- incidents ---------------------------------------------------------------------------------------------

    def _incident(self, name: FaultName) -> None:
        random = self.world.random
        pod = random.choice(self.pods)
        self.incidents[name] = self.incidents.get(name, 0) + 1
        match name:
            case "kill":
                self.kill(pod)
            case "lost_node":
                pod.lose()
            case "freeze":
                pod.process.freeze(random.choice([0.5, 3.0, TTL_S + 3.0, 25.0]), asleep=random.random() < 0.4)
            case "drain":
                if pod.process.alive and pod.gateway.is_serving:
                    self.world.note(f"{pod.process.name} gets SIGTERM")
                    pod.gateway.is_serving = False
                    pod.process.arrives(0.0, lambda: pod.process.create_task(pod.gateway.stop(), name="stop"))
            case "outage" | "restart":
                self.database.outage(random.choice([0.3, 2.0, 6.0, 12.0]), restart=name == "restart")
            case "limits":
                changed = random.choice(sorted(self.limits))
                self.limits[changed] = self.limits[changed] * random.choice([0, 40, 90, 150, 300]) // 100
                self._put(changed)
            case "suspension":
                self.suspended = True
                self._put("all")
                self.world.after(random.uniform(0.5, 4.0), self._resume)
            case "full_disk":
                pod.disk.is_full = self.disk_was_full = True
                self.world.after(random.uniform(0.5, 4.0), lambda: setattr(pod.disk, "is_full", False))

    def kill(self, pod: Pod) -> None:
        """At once, or at one of the next boundaries between the process and the world."""
        process = pod.process
        if not process.alive:
            return
        if self.world.random.random() < 0.3:
            process.kill()
        else:
            process.kill_at = process.boundaries + self.world.random.randint(1, 40)

    def _resume(self) -> None:
        self.suspended = False
        self._put("all")

    # --- budgets -----------------------------------------------------------------------------------------------

    def _limits(self) -> dict[str, int]:
        """Limits that are a part of what all requests may cost together."""
        expected = self.plan.requests * 200 * self.plan.limit_percent // 100
        return {
            "all": expected * 10,
            "user": expected * 10 // 2,
            "tokens": expected,
            "calls": max(self.plan.requests * self.plan.limit_percent // 80, 4),
            "watched": 10,
        }

    def _put(self, name: str) -> None:
        period = self.plan.periods[-1]
        kinds: dict[str, dict[str, Any]] = {
            "all": {"suspended": self.suspended},
            "user": {"per": ["user"], "period": period},
            "tokens": {"unit": "tokens", "period": period, "alignment": "rolling"},
            "calls": {"unit": "requests", "refusal": "rate"},
            "watched": {"enforcement": "soft", "per": ["session"]},
        }
        row: dict[str, Any] = {
            "tenant_id": TENANT,
            "budget_id": name,
            "scope": {},
            "workload_labels": None,
            "per": [],
            "unit": "usd",
            "token_kind": "both",
            "limit_amount": self.limits[name],
            "period": "lifetime",
            "alignment": "calendar",
            "time_zone": "UTC",
            "enforcement": "hard",
            "suspended": False,
            "refusal": "quota",
        }
        self.ledger.put_budget_v1({**row, **kinds[name]})
        self.database.version += 1
        self.world.note(f"budget {name}: {self.limits[name]}, suspended {self.suspended}")
        self.judge.look()

    # --- the run -----------------------------------------------------------------------------------------------

    def run(self, *, steps_max: int | None = None, look_at_all_each: int = 0) -> Outcome:
        """To the end, or to a step."""
        world = self.world
        each = None
        if look_at_all_each:

            def look() -> None:
                if world.steps % look_at_all_each == 0:
                    self.judge.look_at_all()

            each = look
        try:
            world.run(END_S, steps_max=steps_max, each=each)
            if not world.wrong and steps_max is None:
                self.judge.look_at_the_end()
        except WrongError as error:
            world.wrong.append(str(error))
        for wrong in world.wrong:
            world.note(f"WRONG: {wrong}")
        outcomes: dict[str, int] = {}
        for row in self.ledger.requests.values():
            outcomes[row["outcome"]] = outcomes.get(row["outcome"], 0) + 1
        return Outcome(
            seed=self.plan.seed, steps=world.steps, trace=world.trace, wrong=world.wrong, requests=len(self.asked),
            statements=self.statements, outcomes=outcomes, incidents=self.incidents,
        )  # fmt: skip


def simulate(
    seed: int,
    size: Size = "small",
    *,
    parts: Parts | None = None,
    ledger: Callable[[Callable[[], float]], MemoryLedger] = MemoryLedger,
    steps_max: int | None = None,
    told: Callable[[str], None] | None = None,
) -> Outcome:
    """Play one seed. What the sidecars log is of no interest to the run."""
    plan = plan_for(seed) if size == "small" else crowd_for(seed)
    disabled = logging.root.manager.disable
    collects = gc.isenabled()
    logging.disable(logging.WARNING)
    alarms = _Alarms()
    gc.disable()
    try:
        simulation = Simulation(plan, parts=parts, ledger=ledger, told=told)
        alarms.wrong = simulation.world.wrong
        outcome = simulation.run(steps_max=steps_max, look_at_all_each=0 if size == "small" else 100)
        for process in simulation.world.processes:
            process.close()
        return outcome
    finally:
        alarms.close()
        if collects:
            gc.enable()
        logging.disable(disabled)


class _Alarms(logging.Handler):
    """What the product logs with an exception is wrong: nothing here may go wrong in an unknown way."""

    _LOGGERS = ("behest_ledger", "behest_proxy")

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.wrong: list[str] = []
        for name in self._LOGGERS:
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self.wrong.append(f"logged: {record.getMessage()}: {record.exc_info[1]!r}")

    def close(self) -> None:
        for name in self._LOGGERS:
            logging.getLogger(name).removeHandler(self)
            logging.getLogger(name).propagate = True
        super().close()
