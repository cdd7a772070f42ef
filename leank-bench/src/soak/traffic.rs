//! Simulated users: when requests come, and what they ask for.

use leank_train::rng::Rng;

/// What a user asks for.
#[derive(Clone, Debug)]
pub(super) struct Request {
    /// A prefix that others have too, and its tokens.
    pub(super) prefix: Option<(Key, usize)>,
    /// Tokens of the prompt behind it, at least one.
    pub(super) prompt: usize,
    /// Tokens of an answer.
    pub(super) answer: usize,
    /// Answers: they branch off behind the prompt.
    pub(super) answers: usize,
    /// Most tokens that are drafted in a step; 0 for none.
    pub(super) draft: usize,
    /// Whether the prompt's tokens attend, or are only stored.
    pub(super) attends: bool,
    /// The simulated second at which the user gives up, if ever.
    pub(super) until: f64,
}

/// Names a shared prefix.
pub(super) type Key = u64;

/// How many requests come in a second.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Calm,
    Burst,
    /// Next to none: everything ends, and the cache is empty.
    Lull,
}

impl Phase {
    fn rate(self) -> f64 {
        match self {
            Self::Calm => 3.0,
            Self::Burst => 20.0,
            Self::Lull => 0.01,
        }
    }

    /// Mean seconds.
    fn length(self) -> f64 {
        match self {
            Self::Calm => 60.0,
            Self::Burst => 15.0,
            Self::Lull => 300.0,
        }
    }
}

/// Requests without end, in simulated time.
pub(super) struct Traffic {
    random: Rng,
    /// Most tokens of a request, its prefix and its answer included.
    longest: usize,
    /// Times as many requests.
    scale: f64,
    phase: Phase,
    phase_end: f64,
    next: f64,
    prefixes: [(Key, usize); 4],
    keys: Key,
}

impl Traffic {
    /// `longest`: most tokens of a request, at least 64; `scale`: times as many of them as one cache
    /// can serve.
    pub(super) fn new(random: Rng, longest: usize, scale: f64) -> Self {
        let mut traffic = Self {
            random,
            longest,
            scale,
            phase: Phase::Calm,
            phase_end: Phase::Calm.length(),
            next: 0.0,
            prefixes: [(0, 0); 4],
            keys: 0,
        };
        for index in 0..traffic.prefixes.len() {
            traffic.prefixes[index] = traffic.prefix();
        }
        traffic
    }

    /// The simulated second of the next request.
    pub(super) fn next_at(&self) -> f64 {
        self.next
    }

    /// The next request, which comes at [`Traffic::next_at`].
    pub(super) fn next(&mut self) -> Request {
        let request = self.request();
        // Within a phase times between requests are exponential, which forgets: what reaches beyond
        // the phase's end is drawn anew from there.
        loop {
            let next = self.next + self.exponential(1.0 / (self.phase.rate() * self.scale));
            if next <= self.phase_end {
                self.next = next;
                return request;
            }
            self.next = self.phase_end;
            self.phase = match self.phase {
                Phase::Calm if self.random.uniform() < 0.3 => Phase::Lull,
                Phase::Calm => Phase::Burst,
                Phase::Burst | Phase::Lull => Phase::Calm,
            };
            self.phase_end += self.exponential(self.phase.length());
        }
    }

    fn request(&mut self) -> Request {
        let prefix = (self.random.uniform() < 0.4).then(|| {
            let index = self.random.below(self.prefixes.len());
            if self.random.uniform() < 0.05 {
                self.prefixes[index] = self.prefix();
            }
            self.prefixes[index]
        });
        let half = self.longest / 2;
        let before = prefix.map_or(0, |(_, tokens)| tokens);
        let prompt = self.heavy(100.0, 1.2, half - before);
        let answers = [1, 1, 1, 1, 1, 2, 3, 4][self.random.below(8)];
        let patient = self.random.uniform() < 0.9;
        let until = if patient { f64::INFINITY } else { self.next + self.exponential(4.0) };
        Request {
            prefix,
            prompt,
            answer: self.heavy(40.0, 1.0, half),
            answers,
            draft: [0, 0, 0, 2, 4, 8][self.random.below(6)],
            attends: self.random.uniform() < 0.15,
            until,
        }
    }

    fn prefix(&mut self) -> (Key, usize) {
        self.keys += 1;
        (self.keys, self.heavy(80.0, 0.8, self.longest / 4))
    }

    /// Log-normal tokens, at least one and at most `most`.
    fn heavy(&mut self, median: f64, sigma: f64, most: usize) -> usize {
        let tokens = median * (sigma * self.random.normal()).exp();
        (tokens as usize).clamp(1, most)
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.random.uniform()).ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_come_in_bursts_and_fit() {
        let mut traffic = Traffic::new(Rng::new(3), 256, 1.0);
        let (mut per_minute, mut longest) = (vec![0; 600], 0);
        while traffic.next_at() < 36_000.0 {
            per_minute[traffic.next_at() as usize / 60] += 1;
            let Request { prefix, prompt, answer, answers, .. } = traffic.next();
            assert!(prompt > 0 && answer > 0 && answers > 0);
            longest = longest.max(prefix.map_or(0, |(_, tokens)| tokens) + prompt + answer);
        }
        assert!((200..=256).contains(&longest), "{longest}");
        per_minute.sort_unstable();
        // In some minutes nobody comes; in others five times as many as in a usual one.
        assert_eq!(per_minute[30], 0);
        assert!(per_minute[599] > 5 * per_minute[300].max(60), "{per_minute:?}");
    }
}
