# SPDX-License-Identifier: Apache-2.0
"""What may go wrong in a run, and how often: drawn from the seed.

The fault model: storage answers late, in any order, or with an error (a failed write may have
changed any part of its range); an event is lost (a watchdog finds the work seconds later) or comes
for nothing; either end dies at any moment with requests in flight, and a successor comes. What an
end had done when it died stays done. A backend may be replaced by one that offers less, or more,
and what is in flight goes there, as after a migration. The power fails: both ends are gone, and so
may be what no flush has covered. The disk gets another size while it is used.
"""

from dataclasses import dataclass

from xvd.sim.prng import Prng


@dataclass(slots=True)
class Faults:
    """One in so many chances; 0 is never. Each is asked for at each occasion."""

    storage_error: int = 0
    lost_event: int = 0
    spurious_event: int = 0
    backend_death: int = 0
    frontend_death: int = 0
    bad_grant: int = 0
    replacement: int = 0
    power_loss: int = 0
    resize: int = 0

    @property
    def may_fail(self) -> bool:
        """Whether an operation may end with an error."""
        return bool(self.storage_error or self.bad_grant or self.resize)

    @classmethod
    def draw(cls, prng: Prng) -> "Faults":
        """Any mix, from none at all to everything: half of the kinds are off in a run."""

        return cls(
            storage_error=prng.maybe(5, 20, 100),
            lost_event=prng.maybe(3, 10, 50),
            spurious_event=prng.maybe(3, 10, 50),
            backend_death=prng.maybe(200, 500),
            frontend_death=prng.maybe(300, 800),
            bad_grant=prng.maybe(20, 100),
            replacement=prng.maybe(100, 300),
            power_loss=prng.maybe(200, 500),
            resize=prng.maybe(20, 100),
        )
