//! What becomes of sequences behind a step.

use leank_core::{Cache as _, Error as CoreError, SequenceId};
use leank_testkit::{Subject, blocks::Sequence};

use super::{Checked, Job, Prefix, Running, Server, Work, says};

/// Prefixes that are kept for those who come later.
const PREFIXES: usize = 3;

impl<S: Subject> Server<'_, S> {
    /// What follows a step: drafts are refused, other answers wanted, answers branch off, requests end.
    pub(super) fn go_on(&mut self, works: &[Work]) -> Checked {
        let mut ended = Vec::new();
        for &Work { index, tokens, new, .. } in works {
            let Running { job, held, .. } = &mut self.running[index];
            let len = held.tokens.len();
            if new {
                let accepted = 1 + self.random.below(tokens);
                if accepted < tokens {
                    self.take_back(index, len - (tokens - accepted))?;
                } else if job.again > 0 && self.random.below(100) == 0 {
                    job.again -= 1;
                    self.counts.again += 1;
                    let back = self.random.below(len - job.prompt + 1);
                    self.take_back(index, len - back)?;
                }
            } else if job.keeps.is_some_and(|(_, prefix)| prefix == len) {
                self.keep_prefix(index)?;
            }
            let Running { job, held, .. } = &self.running[index];
            if held.tokens.len() == job.known.len() {
                if job.known.len() >= job.end {
                    ended.push(self.running[index].id);
                }
                self.branch(index)?;
            }
        }
        for id in ended {
            self.running.retain(|running| running.id != id);
            self.counts.finished += 1;
            self.release(id, "a request that is done")?;
        }
        Ok(())
    }

    /// Takes tokens back, so that `tokens` remain: with one call, or, where that would be inside a lean
    /// block, some more, which are read again.
    fn take_back(&mut self, index: usize, tokens: usize) -> Checked {
        let stream = self.stream();
        let rules = self.books.rules;
        let Running { job, id, held, cut } = &mut self.running[index];
        let (below, above) = rules.nearest_lengths(held, tokens);
        if below < tokens {
            let lengths = format!("{below} and {above}");
            match self.cache.truncate(*id, tokens) {
                Err(CoreError::Invalid { why, .. }) if why.contains(&lengths) => {}
                other => {
                    return Err(format!(
                        "{id:?}, cut inside a lean block: {other:?}, not {lengths}"
                    ));
                }
            }
            self.counts.cut_early += 1;
        }
        self.cache.truncate(*id, below).map_err(says("taking tokens back"))?;
        rules.truncate(held, below);
        job.known.truncate(tokens);
        job.stream = stream;
        *cut = true;
        self.counts.truncations += 1;
        self.check("taking tokens back")
    }

    /// Keeps the prefix that was just read for others.
    fn keep_prefix(&mut self, index: usize) -> Checked {
        let Some((key, _)) = self.running[index].job.keeps.take() else { return Ok(()) };
        if self.prefixes.iter().any(|prefix| prefix.key == key) {
            return Ok(());
        }
        if self.prefixes.len() == PREFIXES {
            self.forget_prefix()?;
        }
        let (id, held) = self.fork(index)?;
        self.prefixes.push(Prefix { key, id, held });
        self.check("keeping a prefix")
    }

    fn fork(&mut self, index: usize) -> Checked<(SequenceId, Sequence)> {
        let Running { id, held, .. } = &self.running[index];
        self.counts.forks += 1;
        Ok((self.cache.fork(*id).map_err(says("forking a sequence"))?, held.clone()))
    }

    /// Branches the other answers of a request off.
    fn branch(&mut self, index: usize) -> Checked {
        for _ in 0..std::mem::take(&mut self.running[index].job.more) {
            let (id, held) = self.fork(index)?;
            let job = Job { stream: self.stream(), ..self.running[index].job.clone() };
            let cut = self.running[index].cut;
            self.running.push(Running { job, id, held, cut });
        }
        self.check("branching answers off")
    }
}
