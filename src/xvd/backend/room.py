# SPDX-License-Identifier: Apache-2.0
"""What one disk may have of this host: asked of the budget of all, and told where it is less."""

import logging
from dataclasses import replace

from xvd.backend.budget import AGREED, LIVE, NEGOTIABLE, Budget, Claim, Lease
from xvd.backend.features import claim_of, within
from xvd.backend.settings import Settings
from xvd.blkif.features import BackendFeatures
from xvd.blkif.nodes import FrontendConfig
from xvd.errors import BudgetError


class Room:
    """One disk's part of a budget."""

    def __init__(self, budget: Budget, log: logging.LoggerAdapter[logging.Logger]) -> None:
        self._budget = budget
        self._log = log

    def affordable(self, features: BackendFeatures, settings: Settings) -> BackendFeatures:
        """Cut it to what this host has room for now; leave it whole if not even the least can be
        had: the connection is refused then, unless there is room by that time."""
        wanted = claim_of(features, settings)
        try:
            claim = self._budget.fit(wanted, NEGOTIABLE)
        except BudgetError:
            return features
        self._say_less(wanted, claim)
        return within(features, claim)

    def take(self, features: BackendFeatures, settings: Settings, config: FrontendConfig) -> Lease:
        """Take what a connection keeps, or less of it; `BudgetError` says what there is none of."""
        wanted = claim_of(features, settings, config)
        lease = self._budget.take(wanted, AGREED)
        self._say_less(wanted, lease.claim)
        return lease

    def change(self, lease: Lease, ring_pages: int, settings: Settings) -> Settings:
        """Other settings for a connection, as far as there is room beside what others have."""
        wanted = replace(
            lease.claim,
            kept=settings.persistent_grants_of(ring_pages),
            buffer_pages=settings.max_buffer_pages,
        )
        try:
            claim = lease.change(wanted, LIVE)
        except BudgetError as error:
            self._log.warning("%s: what it keeps stays as it was", error)
            claim = lease.claim
        return settings.within(claim)

    def _say_less(self, wanted: Claim, claim: Claim) -> None:
        if claim != wanted:
            self._log.info("this host has no room for all: %s", claim.instead_of(wanted))
