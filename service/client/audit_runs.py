"""Robustness audits: which there are, their reports, and thresholds tried on them."""

from service.client.calls import Call, Content, json_call, path_of
from service.client.parts import Part, Steps, WayT, ask, asked, stepped
from service.wire_audits import AskedSetting, AuditsAnswer, PolicyParameters, ReplayAnswer, ReplayBody


class AuditRuns(Part[WayT]):
    """Runs of `hardlook-lab audit` that the service knows of. Needs the scope `pools:write`.

    All raise ConnectionFailed, AnswerNotUnderstood and ProblemError: NotFound where there is no such audit, Conflict
    where it is damaged or not finished.
    """

    @asked
    def list(self) -> Call[AuditsAnswer]:
        """All of them, newest first, and whether each is of what is deployed."""
        return Call("GET", "/audits", AuditsAnswer)

    @stepped
    def report(self, id: str) -> Steps[bytes]:
        """The report of one: an HTML page that needs nothing else."""
        found = yield from ask(Call("GET", path_of("audits", id, "report"), Content, media_type="text/html"))
        return found.content

    @asked
    def replay(
        self, id: str, system: str, policy: PolicyParameters | None = None, *, setting: AskedSetting | None = None
    ) -> Call[ReplayAnswer]:
        """What a policy would have answered to the images of an audit, beside the policy that serves.

        Args:
            id: of the audit.
            system: of the audit.
            policy: to try; None for the default parameters.
            setting: of the attacked images; None for the headline one.
        """
        body = ReplayBody(system=system, policy=policy or PolicyParameters(), setting=setting)
        return json_call("POST", path_of("audits", id, "replay"), ReplayAnswer, body)
