"""The plan: every decision, before the first byte moves. ``build.build_plan`` builds one; here are its values, which
import no torch."""

from aoconvert.planning.types import ComponentPlan, CopyPlan, FilePlan, Needs, Plan, TensorPlan, Totals

__all__ = ["ComponentPlan", "CopyPlan", "FilePlan", "Needs", "Plan", "TensorPlan", "Totals"]
