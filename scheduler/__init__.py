"""Conflict-free waves of transfer tasks: planned with a proof, run asynchronously. Knows nothing of tensors or Ray."""

from wavecast.scheduler.bounds import Bound
from wavecast.scheduler.cost import LinkCost, TaskCost
from wavecast.scheduler.divide import Cut, Division, chunk_sizes, plan_divisible, plan_preemptive
from wavecast.scheduler.errors import RunError, RunTimeout, ScheduleError, SchedulerError, TaskFailed, TaskTimeout
from wavecast.scheduler.executor import run
from wavecast.scheduler.explain import Explanation, WaveShare, explain
from wavecast.scheduler.fan_out import FanOut, fan_out
from wavecast.scheduler.ports import PortModel
from wavecast.scheduler.receipt import RunReport, TaskReceipt, WaveReceipt
from wavecast.scheduler.schedule import Schedule, Wave, plan_waves
from wavecast.scheduler.simulate import Simulation, simulate
from wavecast.scheduler.strategies import STRATEGIES
from wavecast.scheduler.task import Task
from wavecast.scheduler.verify import verify

__all__ = (
    "Task",
    "PortModel",
    "plan_waves",
    "STRATEGIES",
    "Wave",
    "Schedule",
    "Bound",
    "verify",
    "LinkCost",
    "TaskCost",
    "simulate",
    "Simulation",
    "explain",
    "Explanation",
    "WaveShare",
    "chunk_sizes",
    "plan_divisible",
    "plan_preemptive",
    "Division",
    "Cut",
    "fan_out",
    "FanOut",
    "run",
    "TaskReceipt",
    "WaveReceipt",
    "RunReport",
    "SchedulerError",
    "ScheduleError",
    "RunError",
    "TaskFailed",
    "TaskTimeout",
    "RunTimeout",
)
