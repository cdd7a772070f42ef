//! One cache that serves simulated users, and what must be true of it after everything that happens.

mod lives;
mod queue;

use std::collections::VecDeque;

use leank_core::{
    Backend as _, BlockCount, Cache as _, CacheConfig, Error as CoreError, Layer, Memory, Planner,
    SequenceId, StepEntry,
};
use leank_testkit::{
    CacheOf, Kind, Reference, Rows, Subject, activations,
    blocks::{Books, Plan, Sequence},
};
use leank_train::rng::Rng;

use super::{
    counts::Counts,
    traffic::{Key, Traffic},
};

/// Fails with what was wrong.
pub(super) type Checked<T = ()> = Result<T, String>;

/// Tokens of prompts in a step, and of one prompt that attends.
const READ: usize = 192;
const READ_ATTENDING: usize = 16;
/// Simulated seconds of a step, and of a token in it.
const STEP_SECONDS: f64 = 0.03;
const TOKEN_SECONDS: f64 = 1e-4;

/// What a server is made of.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    /// What is special about it.
    pub(super) name: &'static str,
    pub(super) config: CacheConfig,
    /// Most tokens of a request.
    pub(super) longest: usize,
    /// Times as many users, and as much memory, as one server has otherwise.
    pub(super) scale: usize,
    pub(super) seed: u64,
    /// One step of so many is compared with the oracle.
    pub(super) sample: usize,
}

/// A request on its way. Tokens are named by the stream that wrote them, which with their position
/// decides their activations.
#[derive(Clone, Debug)]
struct Job {
    /// Prompt and answer so far.
    known: Vec<u32>,
    /// Tokens of the prompt, prefix included.
    prompt: usize,
    /// Length at which it is done.
    end: usize,
    /// The prefix to keep for others once it is read.
    keeps: Option<(Key, usize)>,
    /// Answers to branch off behind the prompt.
    more: usize,
    /// Names the tokens that come next.
    stream: u32,
    /// Times that the user may still ask for another answer.
    again: usize,
    draft: usize,
    attends: bool,
    until: f64,
}

struct Running {
    job: Job,
    id: SequenceId,
    held: Sequence,
    /// Some of it was taken back, so that more may be lean than the windows say.
    cut: bool,
}

/// A request that had to make room.
enum Aside {
    Saved {
        job: Job,
        bytes: Vec<u8>,
        held: Sequence,
        cut: bool,
    },
    /// To be computed again.
    Released(Job),
}

impl Aside {
    fn job(&self) -> &Job {
        match self {
            Self::Saved { job, .. } | Self::Released(job) => job,
        }
    }
}

struct Prefix {
    key: Key,
    id: SequenceId,
    held: Sequence,
}

/// What a running sequence does in a step.
#[derive(Clone, Copy)]
struct Work {
    /// Index among those that run.
    index: usize,
    tokens: usize,
    /// Whether they are new, or known and to be read.
    new: bool,
    attend: bool,
}

pub(super) struct Server<'s, S: Subject> {
    subject: &'s S,
    setting: Setting,
    cache: CacheOf<S>,
    planner: Planner,
    books: Books,
    traffic: Traffic,
    random: Rng,
    clock: f64,
    streams: u32,
    waiting: VecDeque<Job>,
    aside: VecDeque<Aside>,
    running: Vec<Running>,
    prefixes: Vec<Prefix>,
    /// The sequence released last.
    gone: Option<SequenceId>,
    pub(super) counts: Counts,
}

fn says(doing: &str) -> impl Fn(CoreError) -> String {
    move |error| format!("{doing}: {error}")
}

/// Fails where `found` is not what was expected.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Checked {
    if found == expected {
        return Ok(());
    }
    Err(format!("{what}: {found:?}, expected {expected:?}"))
}

impl<'s, S: Subject> Server<'s, S> {
    pub(super) fn new(subject: &'s S, setting: Setting) -> leank_core::Result<Self> {
        let rules = subject.backend().layout_rules();
        let fork = |part| Rng::fork(setting.seed, part);
        Ok(Self {
            subject,
            cache: subject.backend().create(setting.config.clone())?,
            planner: Planner::new(&setting.config, rules)?,
            books: Books::new(&setting.config, rules)?,
            traffic: Traffic::new(fork(0), setting.longest, setting.scale as f64),
            random: fork(1),
            clock: 0.0,
            streams: 0,
            waiting: VecDeque::new(),
            aside: VecDeque::new(),
            running: Vec::new(),
            prefixes: Vec::new(),
            gone: None,
            counts: Counts::default(),
            setting,
        })
    }

    pub(super) fn name(&self) -> &'static str {
        self.setting.name
    }

    /// A step of everything that runs, with what happens before and after it.
    pub(super) fn step(&mut self) -> Checked {
        self.arrive();
        self.hang_up()?;
        self.resume()?;
        self.admit()?;
        if self.running.is_empty() {
            self.idle()?
        } else {
            self.serve()?
        }
        self.counts.steps += 1;
        self.counts.simulated_seconds = self.clock;
        Ok(())
    }

    /// Everybody is sent away: the cache must be as it was at the beginning.
    pub(super) fn close(&mut self) -> Checked {
        while !self.running.is_empty() {
            let Running { id, .. } = self.running.remove(0);
            self.release(id, "closing")?;
        }
        self.forget_prefixes()?;
        self.waiting.clear();
        self.aside.clear();
        self.is_empty()?;
        // All of the limit can be had again, by one step.
        let limit = self.setting.config.limit.unwrap_or(0);
        let layout = self.planner.layout();
        let mut blocks = (limit / layout.full_bytes_all_layers()) as usize;
        let fresh = Sequence::default();
        let id = self.cache.add_sequence();
        let reserved = loop {
            let entry = StepEntry::decode(id, blocks * self.setting.config.block);
            let plans = self.books.rules.plan(&[(&fresh, entry)]);
            let reserved = self.books.reserved([&fresh].into_iter(), &plans);
            if self.books.missing(reserved) == 0 {
                self.cache.plan(&[entry]).map_err(says("planning a step of all memory"))?;
                break reserved;
            }
            blocks -= 1;
        };
        same("blocks of a step of all memory", self.cache.memory().blocks, reserved)?;
        self.books.reserve(BlockCount::default(), reserved);
        self.cache.cancel();
        self.release(id, "cancelling a step of all memory")?;
        self.is_empty()
    }

    fn is_empty(&self) -> Checked {
        let Memory { tokens, blocks, dense_bytes, .. } = self.cache.memory();
        let nothing = (0, BlockCount::default(), 0);
        same("tokens, blocks and bytes of an empty cache", (tokens, blocks, dense_bytes), nothing)
    }

    fn stream(&mut self) -> u32 {
        self.streams += 1;
        self.streams
    }

    /// Releases a sequence that was taken off the lists.
    fn release(&mut self, id: SequenceId, why: &str) -> Checked {
        self.cache.release(id).map_err(says(why))?;
        self.gone = Some(id);
        self.check(why)
    }

    /// What everybody does next.
    fn works(&mut self) -> Vec<Work> {
        let mut left = READ;
        let mut works = Vec::new();
        for (index, Running { job, held, .. }) in self.running.iter().enumerate() {
            let len = held.tokens.len();
            let unread = job.known.len() - len;
            if unread == 0 {
                let tokens = 1 + self.random.below(job.draft + 1);
                works.push(Work { index, tokens, new: true, attend: true });
                continue;
            }
            let most = if job.attends { READ_ATTENDING } else { READ };
            // A prefix ends a piece, so that it can be kept.
            let end = job.keeps.map_or(job.known.len(), |(_, tokens)| tokens);
            let tokens = unread.min(end - len).min(most).min(left);
            if tokens > 0 {
                left -= tokens;
                works.push(Work { index, tokens, new: false, attend: job.attends });
            }
        }
        works
    }

    fn serve(&mut self) -> Checked {
        loop {
            let works = self.works();
            let entry = |work: &Work| StepEntry {
                sequence: self.running[work.index].id,
                tokens: work.tokens,
                attend: work.attend,
            };
            let entries: Vec<StepEntry> = works.iter().map(entry).collect();
            let held = works.iter().map(|work| &self.running[work.index].held);
            let named: Vec<_> = held.zip(entries.iter().copied()).collect();
            let plans = self.books.rules.plan(&named);
            let used = self.books.used(self.sequences());
            let reserved = self.books.reserved(self.sequences(), &plans);
            let missing = self.books.missing(reserved);
            match self.cache.plan(&entries) {
                Ok(()) => {
                    same("bytes missing for a step that was planned", missing, 0)?;
                    for ((sequence, _), plan) in named.iter().zip(&plans) {
                        self.books.rules.place(sequence, plan);
                    }
                    self.books.reserve(used, reserved);
                    same("blocks of a step", self.cache.memory().blocks, reserved)?;
                    return self.run(&works, plans);
                }
                Err(CoreError::OutOfMemory { missing: found, .. }) => {
                    same("bytes missing for a step that was refused", found, missing)?;
                    drop(plans);
                    self.counts.refused += 1;
                    self.check("a step that was refused")?;
                    self.make_room()?;
                }
                Err(error) => return Err(says("planning a step")(error)),
            }
        }
    }

    /// Runs a step that was planned.
    fn run(&mut self, works: &[Work], plans: Vec<Plan>) -> Checked {
        let sampled = (self.random.below(self.setting.sample) == 0)
            .then(|| self.random.below(works.len()))
            .filter(|&at| works[at].attend);
        let tokens: usize = works.iter().map(|work| work.tokens).sum();
        let mut sample = Vec::new();
        for layer in self.setting.config.shape.layer_indices() {
            let out = self.layer(layer, works, tokens)?;
            let width = out.heads * out.head_dim;
            let mut row = 0;
            for (at, work) in works.iter().enumerate() {
                let rows = &out.data[row * width..(row + work.tokens) * width];
                row += work.tokens;
                let as_it_should = |x: &f32| if work.attend { x.is_finite() } else { x.is_nan() };
                if !rows.iter().all(as_it_should) {
                    let id = self.running[work.index].id;
                    let attends = work.attend;
                    return Err(format!("{id:?}, layer {layer}, attends: {attends}: {rows:?}"));
                }
                if sampled == Some(at) {
                    sample.push((layer, rows.to_vec()));
                }
            }
        }
        let seconds = STEP_SECONDS + TOKEN_SECONDS * tokens as f64;
        self.clock += seconds;
        self.counts.busy_seconds += seconds;
        if self.random.below(64) == 0 {
            self.cache.cancel();
            drop(plans);
            self.counts.cancelled += 1;
            return self.check("cancelling a step");
        }
        self.cache.commit().map_err(says("committing a step"))?;
        self.counts.tokens += tokens as u64;
        let packed = sampled.map(|at| self.running[works[at].index].held.packed());
        for (work, plan) in works.iter().zip(plans) {
            plan.link();
            let Running { job, held, .. } = &mut self.running[work.index];
            let end = held.tokens.len() + work.tokens;
            if work.new {
                job.known.resize(end, job.stream);
            }
            held.tokens.extend_from_slice(&job.known[held.tokens.len()..end]);
            held.blocks = plan.after;
        }
        if let Some((at, packed)) = sampled.zip(packed) {
            self.compare(works[at], packed, &sample)?;
        }
        self.check("a step")?;
        self.go_on(works)
    }

    /// Appends to and attends from a layer.
    fn layer(&mut self, layer: Layer, works: &[Work], tokens: usize) -> Checked<Rows> {
        let shape = self.setting.config.shape;
        let [k, v, q] = [
            (Kind::Key, shape.kv_heads),
            (Kind::Value, shape.kv_heads),
            (Kind::Query, shape.query_heads),
        ]
        .map(|(kind, heads)| {
            let width = heads * shape.head_dim;
            let mut data = vec![0.0; tokens * width];
            let mut rows = data.chunks_exact_mut(width);
            for &Work { index, tokens, new, .. } in works {
                let Running { job, held, .. } = &self.running[index];
                let start = held.tokens.len();
                for (position, row) in (start..start + tokens).zip(&mut rows) {
                    let stream = if new { job.stream } else { job.known[position] };
                    self.fill(kind, stream, layer, position, row);
                }
            }
            Rows { data, tokens, heads, head_dim: shape.head_dim }
        });
        self.subject.append(&mut self.cache, layer, &k, &v).map_err(says("appending"))?;
        self.subject.attend(&mut self.cache, layer, &q).map_err(says("attending"))
    }

    fn fill(&self, kind: Kind, stream: u32, layer: Layer, position: usize, row: &mut [f32]) {
        let place = [stream as usize, layer.0, position];
        let values = activations(self.setting.seed, kind, place);
        row.iter_mut().zip(values).for_each(|(x, new)| *x = new);
    }

    /// Compares what a sequence got in every layer of the last step with the oracle.
    fn compare(&mut self, work: Work, packed: usize, sample: &[(Layer, Vec<f32>)]) -> Checked {
        let Running { id, held, .. } = &self.running[work.index];
        let end = held.tokens.len();
        let reference = Reference {
            config: &self.setting.config,
            row: &|kind, layer, position, row: &mut [f32]| {
                self.fill(kind, held.tokens[position], layer, position, row);
            },
            packed,
        };
        let (mut outputs, mut largest) = (0, 0.0f64);
        for (layer, got) in sample {
            let positions = end - work.tokens..end;
            let share = reference.check(self.subject, *layer, positions, got, true);
            let share =
                share.map_err(|why| format!("{id:?} of {end} tokens, layer {layer}: {why}"))?;
            largest = largest.max(share);
            outputs += got.len() / self.setting.config.shape.head_dim;
        }
        self.counts.compared += outputs as u64;
        self.counts.sampled += 1;
        self.counts.largest_share = self.counts.largest_share.max(largest);
        Ok(())
    }

    fn sequences(&self) -> impl Iterator<Item = &Sequence> + Clone {
        let running = self.running.iter().map(|running| &running.held);
        running.chain(self.prefixes.iter().map(|prefix| &prefix.held))
    }

    /// Everything that must hold between steps; `after` says after what.
    fn check(&self, after: &str) -> Checked {
        let memory = self.cache.memory();
        let expected = self.books.memory(self.sequences());
        if memory != expected {
            return Err(format!("memory after {after}: {memory:?}, expected {expected:?}"));
        }
        let limit = self.setting.config.limit.unwrap_or(u64::MAX);
        if memory.allocated_bytes < memory.used_bytes() || memory.allocated_bytes > limit {
            return Err(format!("memory after {after}: {memory:?} under a limit of {limit}"));
        }
        let running = self.running.iter().map(|it| (it.id, &it.held, it.cut));
        let prefixes = self.prefixes.iter().map(|it| (it.id, &it.held, false));
        for (id, held, cut) in running.chain(prefixes) {
            let len = self.cache.sequence_len(id).map_err(says(after))?;
            if len != held.tokens.len() {
                return Err(format!("{id:?} after {after}: {len}, not {}", held.tokens.len()));
            }
            let planned = self.planner.footprint(len).map_err(says(after))?.blocks;
            let lean = held.blocks.iter().filter(|block| block.lean).count();
            let blocks = BlockCount { full: held.blocks.len() - lean, lean };
            if !cut && blocks != planned {
                return Err(format!("{id:?} after {after}: {blocks:?}, planned were {planned:?}"));
            }
        }
        match self.gone.map(|gone| (gone, self.cache.sequence_len(gone))) {
            None | Some((_, Err(CoreError::UnknownSequence(_)))) => Ok(()),
            Some((gone, found)) => Err(format!("{gone:?} after its release: {found:?}")),
        }
    }
}
