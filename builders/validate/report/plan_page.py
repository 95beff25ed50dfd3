"""Make the page of a plan, `plan.html.jinja`: what a search has tried, what each choice gave, and what was taken."""

from __future__ import annotations

from builders.validate.report import plan_plots, plan_tables
from builders.validate.report.plan_view import PlanView
from builders.validate.report.template import filled

PLAN_MARK = "smoothquant search report"  # by which we know a page of ours


def plan_page(view: PlanView) -> str:
    """The text of the whole page."""
    facts = view.facts
    winner = next((one for one in facts.candidates if one.name == facts.chosen), facts.candidates[0])
    roundings = plan_plots.rounding_names(facts.linears)
    return filled(
        "plan.html.jinja",
        PLAN_MARK,
        view=view,
        facts=facts,
        checkpoint=view.model.checkpoint.folder.resolve().name,
        tiles=plan_tables.tiles(view),
        trials=plan_tables.outcomes(facts.candidates, winner),
        points=plan_tables.points(view),
        size_curve=plan_plots.size_curve(view),
        choices=plan_tables.choices(view),
        noises=[plan_plots.noise(view, kind) for kind in view.groups],
        noise_legend=plan_plots.noise_legend(view),
        maps=[(kind, drawn) for kind in view.groups if (drawn := plan_plots.candidates(view, kind)) is not None],
        bounds=plan_plots.bounds(),
        roundings=roundings,
        rounding_rows=plan_tables.roundings(view, list(roundings)),
        head=plan_tables.head(view),
        embedding=plan_tables.embedding(view),
        cache=plan_tables.cache(view),
        errors=[plan_plots.roundings(view, kind, roundings) for kind in view.linears],
        kinds=plan_plots.kind_colours(view),
        inputs=[plan_plots.spikes(view), plan_plots.losses(view)],
        in_float=plan_tables.in_float(view),
        spikes=plan_tables.spikes(view),
        provenance=plan_tables.provenance(view),
    )
