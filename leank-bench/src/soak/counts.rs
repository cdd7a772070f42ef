//! What happened in a run.

use serde::Serialize;

/// What happened to one cache, or to all of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Counts {
    /// Steps, those in which nobody was there included.
    pub steps: u64,
    /// Simulated seconds.
    pub simulated_seconds: f64,
    /// Those of them in which something ran.
    pub busy_seconds: f64,
    /// Tokens that were committed.
    pub tokens: u64,
    /// Requests that came.
    pub arrivals: u64,
    /// Those that found too many others waiting.
    pub turned_away: u64,
    /// Requests that were let in.
    pub admitted: u64,
    /// Answers that were finished.
    pub finished: u64,
    /// Requests and answers whose user gave up, waiting, put aside or running.
    pub given_up: u64,
    /// Forks: shared prefixes, and answers that branched off.
    pub forks: u64,
    /// Sequences that were saved to make room.
    pub saved: u64,
    /// Those that were restored.
    pub restored: u64,
    /// Sequences that were released to make room, and computed again.
    pub released: u64,
    /// Plans and restorations that the limit refused.
    pub refused: u64,
    /// Truncations: drafts that were refused, and other answers.
    pub truncations: u64,
    /// Other answers among them, which take back up to a whole answer.
    pub again: u64,
    /// Truncations that would have ended inside a lean block and ended before it.
    pub cut_early: u64,
    /// Steps that were cancelled after attention.
    pub cancelled: u64,
    /// Times that everything was released and the cache was empty.
    pub emptied: u64,
    /// Steps of a sequence that were compared with the oracle.
    pub sampled: u64,
    /// Outputs of a query head that were compared.
    pub compared: u64,
    /// Largest error of an element as a share of its bound.
    pub largest_share: f64,
}

impl Counts {
    /// Adds what happened elsewhere.
    pub(super) fn add(&mut self, other: &Self) {
        for (own, (_, other)) in self.whole_mut().into_iter().zip(other.whole()) {
            *own += other;
        }
        self.simulated_seconds += other.simulated_seconds;
        self.busy_seconds += other.busy_seconds;
        self.largest_share = self.largest_share.max(other.largest_share);
    }

    /// Whole numbers with what they count.
    pub(super) fn whole(&self) -> [(&'static str, u64); 19] {
        let names = [
            "steps",
            "tokens",
            "requests",
            "turned away",
            "admitted",
            "answers finished",
            "given up",
            "forks",
            "saved to make room",
            "restored",
            "released to make room",
            "refused by the limit",
            "truncations",
            "other answers among them",
            "ended before a lean block",
            "steps cancelled",
            "times emptied",
            "steps sampled",
            "outputs compared",
        ];
        let values = self.clone().whole_mut().map(|value| *value);
        std::array::from_fn(|i| (names[i], values[i]))
    }

    fn whole_mut(&mut self) -> [&mut u64; 19] {
        [
            &mut self.steps,
            &mut self.tokens,
            &mut self.arrivals,
            &mut self.turned_away,
            &mut self.admitted,
            &mut self.finished,
            &mut self.given_up,
            &mut self.forks,
            &mut self.saved,
            &mut self.restored,
            &mut self.released,
            &mut self.refused,
            &mut self.truncations,
            &mut self.again,
            &mut self.cut_early,
            &mut self.cancelled,
            &mut self.emptied,
            &mut self.sampled,
            &mut self.compared,
        ]
    }
}
