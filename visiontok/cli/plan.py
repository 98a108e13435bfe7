"""`--dry-run`: what a trial would do, without doing it."""

from __future__ import annotations

from visiontok.bench.results import TrialSpec


def print_plan(spec: TrialSpec) -> int:
    """Prints the plan of a trial's reduction, or the size of an unreduced model."""
    from visiontok.bench.trial import Subject

    subject = Subject(spec)
    sizes = subject.sizes()
    print(f"trial {spec.key[:12]}: {spec.model}, {spec.reducer or 'unreduced'} {spec.budget}".rstrip())
    if subject.reduction is not None:
        print(subject.reduction.plan)
    print(f"GMACs per image: {sizes['gmacs_base']:.4g} -> {sizes['gmacs']:.4g}")
    return 0
