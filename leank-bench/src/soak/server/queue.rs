//! Who comes in, who makes room and who comes back.

use leank_core::{BlockCount, Cache as _, Error as CoreError};
use leank_testkit::{Subject, blocks::Sequence};

use super::{Aside, Checked, Job, Prefix, Running, Server, same, says};
use crate::soak::traffic::Request;

/// Sequences that run at the same time, and requests that wait; both times the scale.
const RUNNING: usize = 24;
const WAITING: usize = 64;
/// Prefixes are forgotten when nobody comes for so many simulated seconds.
const FORGET_SECONDS: f64 = 20.0;

impl<S: Subject> Server<'_, S> {
    pub(super) fn arrive(&mut self) {
        while self.traffic.next_at() <= self.clock {
            let request = self.traffic.next();
            self.counts.arrivals += 1;
            if self.waiting.len() < WAITING * self.setting.scale {
                let job = self.job(request);
                self.waiting.push_back(job);
            } else {
                self.counts.turned_away += 1;
            }
        }
    }

    fn job(&mut self, request: Request) -> Job {
        let Request { prefix, prompt, answer, answers, draft, attends, until } = request;
        let mut known = Vec::new();
        if let Some((key, tokens)) = prefix {
            // Prefixes have streams of their own, the same whenever they are read.
            known.resize(tokens, 1 << 31 | key as u32);
        }
        known.resize(known.len() + prompt, self.stream());
        Job {
            prompt: known.len(),
            end: known.len() + answer,
            known,
            keeps: prefix,
            more: answers - 1,
            stream: self.stream(),
            again: 2,
            draft,
            attends,
            until,
        }
    }

    /// Users give up.
    pub(super) fn hang_up(&mut self) -> Checked {
        let clock = self.clock;
        let before = self.waiting.len() + self.aside.len() + self.running.len();
        self.waiting.retain(|job| job.until > clock);
        self.aside.retain(|aside| aside.job().until > clock);
        while let Some(index) = self.running.iter().position(|running| running.job.until <= clock) {
            let Running { id, .. } = self.running.remove(index);
            self.release(id, "a user who gave up")?;
        }
        let after = self.waiting.len() + self.aside.len() + self.running.len();
        self.counts.given_up += (before - after) as u64;
        Ok(())
    }

    /// Whether a sequence of so many tokens can probably begin. It does not count what those that run
    /// will want.
    fn has_room_for(&self, tokens: usize) -> Checked<bool> {
        let footprint = self.planner.footprint(tokens).map_err(says("planning"))?;
        let needed = self.cache.memory().used_bytes() + footprint.peak_bytes;
        let limit = self.setting.config.limit.unwrap_or(u64::MAX);
        Ok(self.running.len() < RUNNING * self.setting.scale && needed <= limit)
    }

    /// Brings back who had to make room, first come first served.
    pub(super) fn resume(&mut self) -> Checked {
        while let Some(aside) = self.aside.front() {
            let tokens = aside.job().known.len();
            // Now and then it is tried where there may be none.
            if !self.has_room_for(tokens)? && self.random.below(32) > 0 {
                if !self.running.is_empty() || self.prefixes.is_empty() {
                    return Ok(());
                }
                self.forget_prefixes()?;
            }
            match self.aside.pop_front() {
                Some(Aside::Released(job)) => {
                    let (id, held) = (self.cache.add_sequence(), Sequence::default());
                    self.running.push(Running { job, id, held, cut: false });
                }
                Some(Aside::Saved { job, bytes, held, cut }) => {
                    if let Some(back) = self.restore(job, bytes, held, cut)? {
                        self.aside.push_front(back);
                        return Ok(());
                    }
                }
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Restores a sequence; gives it back where there is no room for it.
    fn restore(
        &mut self,
        job: Job,
        bytes: Vec<u8>,
        held: Sequence,
        cut: bool,
    ) -> Checked<Option<Aside>> {
        let used = self.books.used(self.sequences());
        let own = self.books.used([&held].into_iter());
        let all = BlockCount { full: used.full + own.full, lean: used.lean + own.lean };
        let missing = self.books.missing(all);
        let mut stream = &bytes[..];
        match self.cache.restore(&mut stream) {
            Ok(id) => {
                same("bytes missing for a sequence that was restored", missing, 0)?;
                same("bytes behind a sequence that was restored", stream.len(), 0)?;
                self.books.restore(used, &held);
                self.running.push(Running { job, id, held, cut });
                self.counts.restored += 1;
                self.check("restoring a sequence")?;
                Ok(None)
            }
            Err(CoreError::OutOfMemory { missing: found, .. }) => {
                same("bytes missing for a sequence that was not restored", found, missing)?;
                self.counts.refused += 1;
                self.check("a sequence that was not restored")?;
                Ok(Some(Aside::Saved { job, bytes, held, cut }))
            }
            Err(error) => Err(says("restoring a sequence")(error)),
        }
    }

    /// Lets new requests in, unless somebody waits to come back.
    pub(super) fn admit(&mut self) -> Checked {
        while let Some(job) = self.waiting.front()
            && self.aside.is_empty()
        {
            if !self.has_room_for(job.known.len())? {
                if !self.running.is_empty() || self.prefixes.is_empty() {
                    return Ok(());
                }
                self.forget_prefixes()?;
            }
            let Some(mut job) = self.waiting.pop_front() else { return Ok(()) };
            let kept = |prefix: &&Prefix| job.keeps.is_some_and(|(key, _)| key == prefix.key);
            let (id, held) = match self.prefixes.iter().find(kept) {
                Some(prefix) => {
                    job.keeps = None;
                    self.counts.forks += 1;
                    let id = self.cache.fork(prefix.id).map_err(says("forking a prefix"))?;
                    (id, prefix.held.clone())
                }
                None => (self.cache.add_sequence(), Sequence::default()),
            };
            self.running.push(Running { job, id, held, cut: false });
            self.counts.admitted += 1;
            self.check("admitting a request")?;
        }
        Ok(())
    }

    /// Nobody is there: time passes.
    pub(super) fn idle(&mut self) -> Checked {
        same("requests that wait while nothing runs", self.waiting.len() + self.aside.len(), 0)?;
        if self.traffic.next_at() > self.clock + FORGET_SECONDS {
            self.forget_prefixes()?;
            self.is_empty()?;
            self.counts.emptied += 1;
        }
        self.clock = self.traffic.next_at();
        Ok(())
    }

    pub(super) fn forget_prefixes(&mut self) -> Checked {
        while !self.prefixes.is_empty() {
            self.forget_prefix()?;
        }
        Ok(())
    }

    /// The oldest one.
    pub(super) fn forget_prefix(&mut self) -> Checked {
        let Prefix { id, .. } = self.prefixes.remove(0);
        self.release(id, "forgetting a prefix")
    }

    /// Forgets a prefix, or puts somebody aside.
    pub(super) fn make_room(&mut self) -> Checked {
        let alone = self.running.len() == 1;
        if !self.prefixes.is_empty() && (alone || self.random.below(4) == 0) {
            return self.forget_prefix();
        }
        if alone {
            return Err("a sequence does not fit although it has the cache for itself".into());
        }
        let index = self.random.below(self.running.len());
        let Running { job, id, held, cut } = self.running.remove(index);
        let aside = if self.random.below(2) == 0 {
            let mut bytes = Vec::new();
            self.cache.save(id, &mut bytes).map_err(says("saving a sequence"))?;
            self.counts.saved += 1;
            Aside::Saved { job, bytes, held: held.apart(), cut }
        } else {
            self.counts.released += 1;
            Aside::Released(job)
        };
        drop(held);
        self.aside.push_back(aside);
        self.release(id, "putting a sequence aside")
    }
}
