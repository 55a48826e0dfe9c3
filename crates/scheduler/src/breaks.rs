//! Deliberate mistakes, one for each invariant of the simulation, so that a test can show that the
//! invariant would catch them. Outside of this crate's own tests no mistake can be switched on: there
//! [`State::is_broken`] is a constant `false`.

use crate::state::State;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Break {
    /// A call's start is acknowledged and not recorded.
    AcceptsUnrecorded,
    /// A refusal is not told to its caller.
    LosesReply,
    /// A report of an attempt that was superseded decides.
    TakesSupersededReport,
    /// An input that has its outcome stays in memory.
    KeepsFinishedInput,
    /// Outputs of a call are counted with gaps.
    SkipsSequence,
    /// An input waits again without a record of it.
    RequeuesUnrecorded,
    /// What a container ran is forgotten when it ends.
    ForgetsInputsOfTheDead,
    /// A container that ended stays in the desired set.
    KeepsExitedContainer,
    /// A container gets more than its slots.
    IgnoresSlots,
    /// A poll gets more than it asked for.
    IgnoresPollLimit,
    /// A pool grows beyond its maximum.
    IgnoresMaximum,
    /// The machine is given more than it has.
    IgnoresRoom,
    /// A container goes to a worker that does not have its runtime.
    IgnoresRuntime,
    /// All containers start at once.
    IgnoresStartLimit,
    /// An attempt that overruns its time goes on.
    IgnoresTimeouts,
    /// A function that cannot be set up is tried again at once.
    NeverBacksOff,
    /// A pool that found no room is never tried again.
    ForgetsTheLine,
    /// Idle containers stay.
    NeverScalesDown,
    /// A pool's deadline is not filed.
    ForgetsDeadlines,
    /// A draining container gets work.
    DeliversToDraining,
    /// What ran before a restart waits again without a new attempt.
    RecoversAttempts,
    /// A call whose client vanished is forgotten and not closed.
    LeavesCallsOpen,
    /// A container that does not start, or does not end, is left alone.
    IgnoresHangingContainers,
    /// A worker that is silent is waited for.
    WaitsForSilentWorkers,
    /// A worker is given up although it was heard.
    IgnoresSignsOfLife,
    /// New containers go to workers that were given up.
    PlacesOnSilentWorkers,
    /// The reports of containers that were given up are taken as if nothing had happened.
    AnswersTheFenced,
    /// A worker is not told that a container must exist, and starts it again.
    ForgetsSightings,
    /// Containers start before it is known what runs.
    StartsBeforeRecovery,
    /// A container that outlived the server is not recovered.
    ForgetsSurvivors,
    /// A container that outlived the server is recovered without what it runs.
    ForgetsWhatSurvivorsRun,
    /// The last delivery before a restart is taken to have arrived.
    TrustsTheLastDelivery,
    /// Web containers that outlived the server get requests before it is known where they are.
    ServesUnseenWebContainers,
    /// Containers of an older definition, or of functions that are gone, go on after a restart.
    KeepsOutdatedSurvivors,
}

impl State {
    #[cfg(test)]
    pub(crate) fn is_broken(&self, mistake: Break) -> bool {
        self.broken == Some(mistake)
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, reason = "the tests' twin of this function reads it")]
    pub(crate) const fn is_broken(&self, _: Break) -> bool {
        false
    }
}
