//! Continuous batching: requests of all lengths come, are admitted, decode together, branch into several samples,
//! are put aside when memory is short, go on, and end, under a limit of bytes.
//!
//!     cargo run --release -p leank --example continuous_batching
//!     cargo run --release -p leank --example continuous_batching --no-default-features --features cpu
//!
//! With the feature `cuda` and a GPU it runs there. At the end every request's tokens are compared with those
//! that it gives when it has a cache for itself: on the CPU they must be equal to the bit, whatever happened.

use std::collections::VecDeque;

use leank::{Backend, Cache, Error, Planner, SequenceId};

use self::toy::{HostCache, Job, Random, Result, Toy, Work, config, on_the_best_backend};

#[path = "toy/mod.rs"]
mod toy;

/// Prompt tokens of a request in one step, so that long prompts do not hold up those who decode.
const CHUNK: usize = 48;
/// Sequences that run at the same time.
const MAX_RUNNING: usize = 12;
const LIMIT: u64 = 900 << 10;

/// What a user asks for.
#[derive(Clone)]
struct Request {
    id: usize,
    prompt: Vec<u32>,
    /// Tokens to generate, per sample.
    new: usize,
    /// Continuations of the prompt; they differ in their first token.
    samples: u32,
}

/// A sample of a request: what it has been fed is in the cache.
struct Sequence {
    request: usize,
    sample: u32,
    /// Prompt and what was generated.
    tokens: Vec<u32>,
    /// Tokens of them that the cache holds.
    fed: usize,
    /// Length at which it is done.
    end: usize,
    /// Samples to branch off once the prompt is read.
    more: u32,
}

/// A sequence that runs, or one that was put aside with its part of the cache.
struct Running {
    own: Sequence,
    id: SequenceId,
}

struct Aside {
    own: Sequence,
    saved: Vec<u8>,
}

#[derive(Default)]
struct Counts {
    steps: usize,
    tokens: usize,
    aside: usize,
    forks: usize,
    peak: u64,
    ratio: f64,
}

struct Scheduler<'a, C> {
    toy: &'a Toy,
    cache: C,
    planner: Planner,
    waiting: VecDeque<Request>,
    aside: VecDeque<Aside>,
    running: Vec<Running>,
    done: Vec<Sequence>,
    counts: Counts,
}

impl<C: HostCache> Scheduler<'_, C> {
    /// Until nothing is left to do.
    fn run(&mut self) -> Result<()> {
        loop {
            self.resume()?;
            self.admit()?;
            if self.running.is_empty() {
                return Ok(());
            }
            self.step()?;
        }
    }

    /// Bytes that a sequence of this length may take on its next step. Shared blocks are counted again, so it
    /// errs on the safe side.
    fn bytes(&self, tokens: usize) -> Result<u64> {
        Ok(self.planner.footprint(tokens)?.peak_bytes)
    }

    fn has_room_for(&self, tokens: usize) -> Result<bool> {
        // A block more for each that runs: those grow too.
        let growth = self.bytes(1)? * self.running.len() as u64;
        let needed = self.cache.memory().used_bytes() + growth + self.bytes(tokens)?;
        Ok(self.running.len() < MAX_RUNNING && (self.running.is_empty() || needed <= LIMIT))
    }

    /// Brings back what was put aside, first come first served.
    fn resume(&mut self) -> Result<()> {
        while let Some(aside) = self.aside.front()
            && self.has_room_for(aside.own.fed + CHUNK)?
        {
            let id = self.cache.restore(&mut &aside.saved[..])?;
            if let Some(Aside { own, .. }) = self.aside.pop_front() {
                self.running.push(Running { own, id });
            }
        }
        Ok(())
    }

    /// Lets new requests in, unless somebody waits to come back.
    fn admit(&mut self) -> Result<()> {
        while let Some(request) = self.waiting.front()
            && self.aside.is_empty()
            && self.has_room_for(request.prompt.len())?
        {
            let Some(Request { id, prompt, new, samples }) = self.waiting.pop_front() else {
                break;
            };
            let end = prompt.len() + new;
            let own =
                Sequence { request: id, sample: 0, tokens: prompt, fed: 0, end, more: samples - 1 };
            self.running.push(Running { own, id: self.cache.add_sequence() });
        }
        Ok(())
    }

    /// A step of everything that runs: a chunk of those that read their prompt, a token of the others.
    fn step(&mut self) -> Result<()> {
        let next = loop {
            let work: Vec<_> = self.running.iter().map(Running::work).collect();
            match self.toy.step(&mut self.cache, &work) {
                Ok(next) => break next,
                Err(error) if is_out_of_memory(&*error) && self.running.len() > 1 => {
                    // The one that came last, so that the others get done.
                    self.put_aside()?;
                }
                Err(error) => return Err(error),
            }
        };
        let memory = self.cache.memory();
        self.counts.steps += 1;
        self.counts.tokens += next.len();
        self.counts.peak = self.counts.peak.max(memory.used_bytes());
        self.counts.ratio += memory.whole_kv_ratio().unwrap_or(1.0);
        let (mut row, mut branches) = (0, Vec::new());
        for running in &mut self.running {
            row += running.work().tokens.len();
            running.own.fed += running.work().tokens.len();
            if running.own.fed == running.own.tokens.len() {
                // Behind the prompt, other samples begin with other tokens.
                for sample in 1..=std::mem::take(&mut running.own.more) {
                    let id = self.cache.fork(running.id)?;
                    let mut own = Sequence {
                        sample,
                        tokens: running.own.tokens.clone(),
                        more: 0,
                        ..running.own
                    };
                    own.tokens.push((next[row - 1] + sample) % toy::VOCABULARY);
                    branches.push(Running { own, id });
                    self.counts.forks += 1;
                }
                running.own.tokens.push(next[row - 1]);
            }
        }
        self.running.append(&mut branches);
        let (ended, running) = std::mem::take(&mut self.running)
            .into_iter()
            .partition(|running| running.own.tokens.len() >= running.own.end);
        self.running = running;
        for Running { own, id } in ended {
            self.cache.release(id)?;
            self.done.push(own);
        }
        Ok(())
    }

    fn put_aside(&mut self) -> Result<()> {
        let Some(Running { own, id }) = self.running.pop() else { return Ok(()) };
        let mut saved = Vec::new();
        self.cache.save(id, &mut saved)?;
        self.cache.release(id)?;
        self.aside.push_back(Aside { own, saved });
        self.counts.aside += 1;
        Ok(())
    }
}

impl Running {
    /// What it wants to be fed next.
    fn work(&self) -> Work<'_> {
        let Sequence { tokens, fed, .. } = &self.own;
        let tokens = &tokens[*fed..tokens.len().min(fed + CHUNK)];
        Work { sequence: self.id, tokens }
    }
}

fn is_out_of_memory(error: &(dyn std::error::Error + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(Error::OutOfMemory { .. }))
}

struct Serve(Vec<Request>);

impl Job for Serve {
    fn run<B: Backend<Cache: HostCache>>(self, backend: &B) -> Result<()> {
        let toy = Toy::new();
        let scheduler = |limit, requests: &[Request]| -> Result<Scheduler<'_, B::Cache>> {
            let config = config(limit)?;
            Ok(Scheduler {
                toy: &toy,
                planner: Planner::new(&config, backend.layout_rules())?,
                cache: backend.create(config)?,
                waiting: requests.iter().cloned().collect(),
                aside: VecDeque::new(),
                running: Vec::new(),
                done: Vec::new(),
                counts: Counts::default(),
            })
        };
        let mut together = scheduler(Some(LIMIT), &self.0)?;
        together.run()?;
        let Counts { steps, tokens, aside, forks, peak, ratio } = together.counts;
        println!("{}: {} requests in {steps} steps, {tokens} tokens", backend.name(), self.0.len());
        println!("{forks} samples branched off, {aside} times one was put aside and came back");
        println!(
            "at most {} of {} KiB in use, {:.3} of a dense cache on average",
            peak >> 10,
            LIMIT >> 10,
            ratio / steps as f64
        );
        assert_eq!(together.cache.memory().used_bytes(), 0, "everything was given back");

        let mut equal = 0;
        for request in &self.0 {
            let mut alone = scheduler(None, std::slice::from_ref(request))?;
            alone.run()?;
            for own in &alone.done {
                let same =
                    |other: &&Sequence| (other.request, other.sample) == (own.request, own.sample);
                let other = together.done.iter().find(same).ok_or("a sample was lost")?;
                equal += usize::from(other.tokens == own.tokens);
            }
        }
        println!("{equal} of {} samples are the same as alone", together.done.len());
        let exact = backend.name().starts_with("cpu");
        assert!(!exact || equal == together.done.len(), "a sample depends on the others");
        Ok(())
    }
}

pub(crate) fn main() -> Result<()> {
    let mut random = Random(7);
    let requests = (0..24).map(|id| Request {
        id,
        prompt: {
            let tokens = 20 + random.below(400) as usize;
            random.tokens(tokens)
        },
        new: 8 + random.below(60) as usize,
        samples: 1 + random.below(3),
    });
    on_the_best_backend(Serve(requests.collect()))
}
