"""What `assess` returns: predicted, attained and certified side by side, in one table and a few sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxlimit.application.answers import CertifiedNetwork, Cut
from jaxlimit.core.display import Displayed, View, aligned, fill
from jaxlimit.core.trees import PyTree
from jaxlimit.limits.estimate import Estimate
from jaxlimit.limits.result import PruningLimit
from jaxlimit.limits.status import Code, counted
from jaxlimit.measuring.certificates import Certificate
from jaxlimit.pruning.result import Attained
from jaxlimit.training.losses import TITLES

COLUMNS = ("", "predicted", "interval", "true rise", "attained", "certified")
TRUSTED = (
    "Gauss-Newton leaves out the second derivative of the network itself. About half of the networks of "
    "docs/limits.md were attained between its cone and its readjusted limit, most others beyond; limits of "
    "|H| were lower."
)
_THE = {"hessian": "the Hessian |H|", "gauss_newton": "Gauss-Newton"}
# The limits that are compared with what was attained, by curvature.
_JUDGED = (
    ("gauss_newton", ("cone", "readjusted")),
    *(("hessian", (name,)) for name in ("readjusted", "cone", "width")),
)
# The unpruned network's loss falls to less than this share of what it was: then training is a part of it.
UNTRAINED = 0.5


@dataclass(frozen=True, eq=False, repr=False)
class Assessment(Displayed):
    """How sparse a network may be: predicted, attained and certified. Prints as a table.

    Attributes:
        predicted: limits from the curvature at the trained weights, by curvature: "hessian", "gauss_newton".
        cut: measured: how far the loss stays within the tolerance when weights are cut and none readjusted.
        attained: the sparsest network within the tolerance that was built, its kept weights readjusted.
        certificate: how far the networks on the way to it are certified on new data; None where nothing is
            to be certified.
        not_certified: why there is no certificate; empty where there is one.
        attained_error: mean risk of the attained network on the test data, None where no risk is known.
        certified: the sparsest network that is certified, with its parameters and its mask; None where
            nothing is certified.
    """

    predicted: Mapping[str, PruningLimit]
    cut: Cut
    attained: Attained
    certificate: Certificate | None
    not_certified: str
    attained_error: float | None
    certified: CertifiedNetwork | None = None

    @property
    def dense_error(self) -> float | None:
        """Mean risk of the unpruned network on the test data, None where no risk is known."""
        return None if self.cut.errors is None else self.cut.errors[0]

    @property
    def recommendation(self) -> str:
        """The answer in a line."""
        certified = "nothing is certified"
        if self.certificate is not None and self.certificate.sparsity is not None:
            certified = f"certified to {_shown(self.certificate.sparsity)}"
        cut, attained = _shown(self.cut.sparsity), _shown(self.attained.sparsity)
        return f"cut to {cut} as it is; {attained} with readjustment; {certified}"

    @property
    def judged(self) -> tuple[str, Mapping[str, Estimate]] | None:
        """The prediction that what was attained is compared with: a curvature, and its limits, by name.

        Cone and readjusted of Gauss-Newton, which were nearest to what was attained on the networks of
        docs/limits.md. Without that curvature the nearest one that the Hessian has.
        """
        for curvature, names in _JUDGED:
            if curvature in self.predicted:
                found = self.predicted[curvature].estimates()
                known = {name: found[name] for name in names if name in found and not found[name].crossed}
                if known:
                    return curvature, known
        return None

    @property
    def agreement(self) -> str:
        """Whether prediction and attainment agree, in a sentence."""
        if self.judged is None:
            return (
                "No limit of readjusted networks was predicted that could be compared with what was attained."
            )
        curvature, limits = self.judged
        attained, close = self.attained.sparsity, self.attained.tolerance
        lowest = min(limits, key=lambda name: limits[name].lower)
        highest = max(limits, key=lambda name: limits[name].upper)
        the = _THE[curvature]
        if attained > limits[highest].upper:
            return (
                f"They do not agree: a network of sparsity {attained:.4f} was built, beyond the {highest} "
                f"limit of {the}, {limits[highest]}; for this network the prediction is refuted, and too low."
            )
        if attained < limits[lowest].lower - close:
            return (
                f"They differ: {attained:.4f} was attained, below the {lowest} limit of {the}, "
                f"{limits[lowest]}. That refutes nothing: another search may find a sparser network."
            )
        if lowest == highest:
            about = f"and the {lowest} limit of {the} is {limits[lowest]}"
        else:
            about = (
                f"between the {lowest} limit of {the}, {limits[lowest]}, and its {highest} limit, "
                f"{limits[highest]}"
            )
        return f"They agree: {attained:.4f} was attained, {about}."

    @property
    def sentences(self) -> tuple[str, str, str, str]:
        """What was asked, the answer, whether prediction and attainment agree, and what is recommended."""
        return self._asked, self._answer, self.agreement, f"Recommended: {self.recommendation}."

    @property
    def _asked(self) -> str:
        first = next(iter(self.predicted.values()))
        groups = "" if first.num_groups is None else f", in {counted(first.num_groups, 'group')},"
        return (
            f"Asked: how many of {first.dim:,} weights{groups} can go while the mean loss of "
            f"{first.num_examples:,} examples, {self.attained.dense_loss:.4g}, rises by at most "
            f"{self.attained.loss_tolerance:.4g}."
        )

    @property
    def _answer(self) -> str:
        parts = []
        if self.judged is not None:
            values = sorted(f"{limit.value:.4f}" for limit in self.judged[1].values())
            parts.append(f"predicted {' to '.join(dict.fromkeys((values[0], values[-1])))}")
        parts.append(f"attained {self.attained.sparsity:.4f} ({self.cut.sparsity:.4f} without readjustment)")
        certificate = self.certificate
        if certificate is None:
            parts.append("certified nothing")
        elif certificate.sparsity is None:
            parts.append(f"certified nothing with {certificate.num_examples:,} examples")
        else:
            parts.append(f"certified {certificate.sparsity:.4f} on new data")
        return f"Answer: {', '.join(parts)}."

    def rows(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """The cells of the table under `COLUMNS`, by the title of the curvature."""
        certificate = self.certificate
        certified = (
            "-" if certificate is None or certificate.sparsity is None else f"{certificate.sparsity:.4f}"
        )

        def cells(name: str, limit: Estimate, rise: float) -> tuple[str, ...]:
            alone = name == "one_shot"
            reached = self.cut.sparsity if alone else self.attained.sparsity
            interval, rises = f"[{limit.lower:.4f}, {limit.upper:.4f}]", f"{rise:.3g}"
            return name, f"{limit.value:.4f}", interval, rises, f"{reached:.4f}", "" if alone else certified

        return [
            (TITLES[name], [cells(which, x, limit.rises[which]) for which, x in limit.estimates().items()])
            for name, limit in self.predicted.items()
        ]

    def notes(self) -> list[str]:
        """What the reader of the table must know, by paragraph."""
        attained, unpruned = self.attained, self.attained.unpruned_loss
        notes = [
            "true rise: how much the loss itself rises at the predicted sparsity, where weights are cut and "
            "none is readjusted.",
            "attained: for one_shot, the largest sparsity measured at which the loss of the cut network "
            f"stays within the tolerance (the next one is {self.cut.next:.4f}); for the others, the sparsity "
            "of the sparsest network that was built within the tolerance, its kept weights readjusted.",
            f"attained: {attained.status}",
        ]
        if unpruned is not None and unpruned < UNTRAINED * attained.dense_loss:
            notes.append(
                f"The same products without pruning lower the loss from {attained.dense_loss:.4g} to "
                f"{unpruned:.4g}: a part of what was attained is further training."
            )
        if self.cut.errors is not None:
            cut = self.cut.errors[self.cut.sparsities.index(self.cut.sparsity)]
            errors = [
                "not finite" if x is None else f"{x:.4g}"
                for x in (self.dense_error, cut, self.attained_error)
            ]
            notes.append(
                f"Error on the test data: {errors[0]} unpruned, {errors[1]} cut to {self.cut.sparsity:.4f}, "
                f"{errors[2]} attained."
            )
        if self.certificate is None:
            notes.append(f"certified: nothing: {self.not_certified}")
        else:
            notes.append(f"certified: {_risk(self.certificate)} {self.certificate.status}")
        if "gauss_newton" in self.predicted:
            notes.append(TRUSTED)
        for name, limit in self.predicted.items():
            if limit.code is not Code.EXACT:
                notes.append(f"{TITLES[name]}: {limit.status}")
        return notes

    def text(self, notes: Sequence[str] = ()) -> str:
        """Sentences, table and notes for a terminal.

        Args:
            notes: further ones.
        """
        head, *lines = aligned([COLUMNS, *self._cells("  ")])
        rule = "-" * len(head)
        return "\n".join(
            [*map(fill, self.sentences), "", head, rule, *lines, rule, *map(fill, [*self.notes(), *notes])]
        )

    def _cells(self, indent: str) -> list[tuple[str, ...]]:
        """Rows of the table, those of a curvature below its title."""
        return [
            line
            for title, rows in self.rows()
            for line in [(title,), *((indent + name, *others) for name, *others in rows)]
        ]

    def _view(self) -> View:
        asked, answer, agreement, recommended = self.sentences
        above = f"{answer} {recommended}"
        return View(above, COLUMNS, self._cells(""), [asked, agreement, *self.notes()])

    def __repr__(self) -> str:
        return self.text()

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays, as JSON values."""
        return {
            "predicted": {name: limit.to_json() for name, limit in self.predicted.items()},
            "cut": self.cut.to_json(),
            "attained": self.attained.to_json(),
            "certificate": None if self.certificate is None else self.certificate.to_json(),
            "not_certified": self.not_certified,
            "attained_error": self.attained_error,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], params: PyTree = None, mask: PyTree = None) -> "Assessment":
        """The inverse of `to_json`, but for spectra, and the network where it is not given.

        Raises:
            ValueError: the values are not those of an assessment.
        """
        try:
            certificate = values["certificate"]
            return cls(
                predicted={name: PruningLimit.from_json(x) for name, x in values["predicted"].items()},
                cut=Cut.from_json(values["cut"]),
                attained=Attained.from_json(values["attained"], params, mask),
                certificate=None if certificate is None else Certificate.from_json(certificate),
                not_certified=values["not_certified"],
                attained_error=values["attained_error"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"these are not the values of an Assessment: {type(error).__name__}: {error}."
            ) from error


def _risk(certificate: Certificate) -> str:
    """What is certified, in a sentence."""
    lower, _ = certificate.bounds
    what = "the error rises by" if lower < 0 else "the error is"
    return (
        f"on new data {what} at most {certificate.bound:.4g}, with a confidence of "
        f"{certificate.confidence:.10g} ({certificate.num_examples:,} test examples);"
    )


def _shown(sparsity: float) -> str:
    """As many digits as the search is accurate to, rounded down: no sparser network is meant."""
    return f"{int(1000 * sparsity + 1e-9) / 1000:.3f}".removeprefix("0")
