"""What the gateway answers besides completions. Members that a newer gateway adds are kept as attributes, too."""

from openai import BaseModel

__all__ = [
    "BillingUsage",
    "Budget",
    "Costs",
    "ModelCosts",
    "SessionCosts",
    "Thread",
    "ThreadMessage",
    "Usage",
    "UsageBin",
]


class Thread(BaseModel):
    """One conversation of a user."""

    id: str
    created_at: str | None = None
    updated_at: str | None = None


class ThreadMessage(BaseModel):
    """One message of a thread."""

    role: str
    content: str | None = None
    created_at: str | None = None
    id: int | None = None
    """Its number in the thread, from 1."""
    complete: bool = True
    """False: a reply that broke off, or is still under way."""
    last_event_id: str | None = None
    """Of a reply that broke off: with it the same call goes on where `content` ends."""


class Costs(BaseModel):
    """What something came to."""

    requests: int
    input_tokens: int
    output_tokens: int
    cost_usd: float


class UsageBin(Costs):
    """One piece of time."""

    timestamp: str
    tokens: int


class UsageTotals(Costs):
    """All of the time that was asked for."""

    tokens: int


class Usage(BaseModel):
    """What was used, by time."""

    totals: UsageTotals
    breakdown: list[UsageBin]


class ModelCosts(Costs):
    """Of one model."""

    model: str


class SessionCosts(Costs):
    """Of one session."""

    session_id: str


class Bill(Costs):
    """What one payer's keys were used for."""

    by_model: list[ModelCosts]
    by_session: list[SessionCosts]


class BillingUsage(BaseModel):
    """What was used, by whose key paid, model and session."""

    project_id: str
    platform: Bill
    byok: Bill


class Budget(BaseModel):
    """A budget that binds the caller. Amounts are decimal numbers in text, in `unit`."""

    budget: str
    unit: str
    limit: str
    spent: str
    held: str
    remaining: str
    window: str
    enforcement: str
    suspended: bool
    phase: str
    resets_at: str | None = None
