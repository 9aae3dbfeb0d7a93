"""The plan: every decision, before the first byte moves."""

from aoconvert.plan.make import make
from aoconvert.plan.types import ComponentPlan, CopyPlan, FilePlan, Needs, Plan, TensorPlan, Totals

__all__ = ["ComponentPlan", "CopyPlan", "FilePlan", "Needs", "Plan", "TensorPlan", "Totals", "make"]
