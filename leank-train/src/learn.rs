//! From a dump to a mask.

use std::{fmt, ops::Range, path::PathBuf, str::FromStr};

use leank_core::{
    ChannelMask, HeadPrecision, InputRecord, KvHead, Layer, MaskInfo, ModelMask, RunRecord, Windows,
};

use crate::{
    Error, Result,
    allocate::{AllocateOptions, Allocation, allocate},
    baseline::{order_by_score, quantile_counts, static_scores},
    dump::{Dump, LayerDump, Manifest, Probe, SequenceInfo},
    leank::{self, Trained, Trainer},
    order::{
        self, HeadCurve, PrecisionCurve, eliminate, eliminate_once, measure_precisions,
        measured_counts,
    },
    records::{HeadResult, OnProgress, Phase, record_name},
    stats::HeadEvaluator,
};

/// How channels are ranked and counts chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Method {
    /// Backward elimination with re-linearisation, exact allocation.
    #[default]
    E2,
    /// One quadratic model per head, exact curve along its order, exact allocation: faster.
    E1,
    /// Norm of q times norm of k, quantile and rounding: a baseline.
    Static,
    /// LeanK's two stages of training, quantile and rounding: the paper's method.
    LeanK,
}

impl Method {
    /// Every method.
    pub const ALL: [Self; 4] = [Self::E2, Self::E1, Self::Static, Self::LeanK];
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::E2 => "e2",
            Self::E1 => "e1",
            Self::Static => "static",
            Self::LeanK => "leank",
        })
    }
}

impl FromStr for Method {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|method| method.to_string() == name).ok_or_else(|| {
            Error::options("method", format!("{name:?} is none of e2, e1, static and leank"))
        })
    }
}

/// What a learning run depends on, apart from the budget.
#[derive(Clone, Debug, PartialEq)]
pub struct LearnOptions {
    /// How.
    pub method: Method,
    /// Tokens that stay whole.
    pub windows: Windows,
    /// Channels removed between two measurements; a divisor of every alignment to come.
    pub step: usize,
    /// Seed of what is random (only [`Method::LeanK`]).
    pub seed: u64,
    /// Threads; 0 for as many as the machine has.
    pub threads: usize,
    /// Where records are kept; the dump's own `learn` directory when `None`.
    pub records: Option<PathBuf>,
    /// Whether [`learn`] measures the losses of 8 and 4 bits too; [`learn_mask`] does where the budget
    /// may be spent on them.
    pub precisions: bool,
    /// The run that this is, for the mask to tell; the dump is added to its inputs.
    pub run: Option<RunRecord>,
}

impl Default for LearnOptions {
    fn default() -> Self {
        Self {
            method: Method::default(),
            windows: Windows::default(),
            step: 8,
            seed: 0,
            threads: 0,
            records: None,
            precisions: false,
            run: None,
        }
    }
}

/// The curves of all heads of a model: they serve every budget and alignment.
#[derive(Clone, Debug, PartialEq)]
pub struct Curves {
    /// Layer-major: head `h` of layer `l` is `heads[l * kv_heads + h]`.
    pub heads: Vec<HeadCurve>,
    /// Losses in 16, 8 and 4 bits, one per head; empty where they were not asked for.
    pub precisions: Vec<PrecisionCurve>,
}

impl Curves {
    /// Importance of every channel, `[layers, kv_heads, head_dim]`: see [`HeadCurve::importance`].
    #[must_use]
    pub fn importance(&self) -> Vec<f32> {
        self.heads.iter().flat_map(HeadCurve::importance).collect()
    }
}

/// A mask, with what it is predicted to cost.
#[derive(Clone, Debug, PartialEq)]
pub struct Learned {
    /// The mask, with scores and info.
    pub mask: ModelMask,
    /// Kept counts and summed loss.
    pub allocation: Allocation,
    /// Valid positions of the dump whose windows cover all that they see. They count as positions
    /// that lose nothing, so where they are many the predicted loss is too low, and prefixes as
    /// long as those of deployment are the mend. 0 in a dump that suits the windows.
    pub without_middle: usize,
}

/// Learns the curves of every head, or reads those that are recorded.
///
/// [`Method::LeanK`] has no curves: use [`learn_mask`].
///
/// # Errors
/// [`Error::Options`]; [`Error::NoMiddle`] when the windows cover all that the dump's positions
/// see; [`Error::NonFinite`], [`Error::Overflow`] and [`Error::Io`] from the dump;
/// [`Error::Record`]; [`Error::Threads`].
pub fn learn(dump: &Dump, options: &LearnOptions, progress: OnProgress<'_>) -> Result<Curves> {
    curves(dump, options, 0..dump.manifest().shape.layers, progress)
}

/// Measures some layers and keeps their records, from which [`learn`] goes on: one share of the work
/// of several machines.
///
/// # Errors
/// As [`learn`]; [`Error::Options`] for layers that the dump does not have, or none.
pub fn measure_layers(
    dump: &Dump,
    options: &LearnOptions,
    layers: Range<usize>,
    progress: OnProgress<'_>,
) -> Result<()> {
    let count = dump.manifest().shape.layers;
    if layers.is_empty() || layers.end > count {
        let why = format!("{}..{} are not among the layers 0..{count}", layers.start, layers.end);
        return Err(Error::options("layers", why));
    }
    curves(dump, options, layers, progress).map(drop)
}

/// The curves of the heads of some layers.
fn curves(
    dump: &Dump,
    options: &LearnOptions,
    layers: Range<usize>,
    progress: OnProgress<'_>,
) -> Result<Curves> {
    let run = Run { layers, ..Run::new(dump, options, progress)? };
    let (windows, step) = (options.windows, options.step);
    let heads = match options.method {
        Method::E2 => run.phase("elimination", "", |layer, head| {
            eliminate(&mut HeadEvaluator::new(layer, head, windows), step)
        }),
        Method::E1 => run.phase("elimination", "", |layer, head| {
            eliminate_once(&mut HeadEvaluator::new(layer, head, windows), step)
        }),
        Method::Static => run.phase("static scores", "", |layer, head| {
            let scores = static_scores(layer, head)?;
            let order = order_by_score(&scores);
            let curve = order::measure(&mut HeadEvaluator::new(layer, head, windows), order, step)?;
            Ok(HeadCurve { scores, ..curve })
        }),
        Method::LeanK => Err(no_curves()),
    }?;
    let precisions = if options.precisions { run.precisions(&heads, windows)? } else { Vec::new() };
    Ok(Curves { heads: heads.into_iter().flatten().collect(), precisions })
}

/// The curves of every head as [`learn`] recorded them: nothing is computed, nothing written. `None`
/// where a layer's record is missing.
///
/// # Errors
/// [`Error::Options`]; [`Error::NoMiddle`] as [`learn`]; [`Error::Record`] for a damaged record;
/// [`Error::Io`]; [`Error::Threads`].
pub fn recorded(dump: &Dump, options: &LearnOptions) -> Result<Option<Curves>> {
    if options.method == Method::LeanK {
        return Err(no_curves());
    }
    let run = Run::new(dump, &LearnOptions { threads: 1, ..options.clone() }, &|_| {})?;
    let Some(heads) = run.recorded("")? else { return Ok(None) };
    let mut precisions = Vec::new();
    if options.precisions {
        let Some(found) = run.recorded(PRECISIONS)? else { return Ok(None) };
        run.check_order(&found, &heads)?;
        precisions = found.into_iter().flatten().collect();
    }
    Ok(Some(Curves { heads: heads.into_iter().flatten().collect(), precisions }))
}

fn no_curves() -> Error {
    let why = "leank trains for one budget, over all layers, and has no curves";
    Error::options("method", why)
}

/// Learns a mask for a budget. Whatever an earlier run has recorded is not computed again.
///
/// ```
/// use leank_core::{Dtype, ModelShape, Windows};
/// use leank_train::{
///     allocate::{AllocateOptions, Budget},
///     learn::{LearnOptions, learn_mask},
///     synthetic::Synthetic,
/// };
///
/// # fn main() -> leank_train::Result<()> {
/// # let dir = tempfile::tempdir().unwrap();
/// # let dir = dir.path().join("dump");
/// // A dump of a real model comes from `leank dump`.
/// let dump = Synthetic {
///     shape: ModelShape::new(2, 4, 2, 16)?,
///     prefixes: vec![50, 80],
///     positions: 8,
///     draws: 2,
///     dtype: Dtype::F16,
///     seed: 0,
/// }
/// .write(&dir)?;
/// let options = LearnOptions {
///     windows: Windows { sink: 4, recent: 8 },
///     step: 4,
///     ..LearnOptions::default()
/// };
/// let budget = AllocateOptions { alignment: 4, ..AllocateOptions::new(Budget::KRatio(0.5)) };
/// let learned = learn_mask(&dump, &options, &budget, &|progress| {
///     eprintln!("{} of {} heads", progress.done, progress.total);
/// })?;
/// assert!(learned.mask.summary().kept_k <= 0.5);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`learn`] and [`allocate`]; options are checked before anything is computed.
pub fn learn_mask(
    dump: &Dump,
    options: &LearnOptions,
    budget: &AllocateOptions,
    progress: OnProgress<'_>,
) -> Result<Learned> {
    let shape = dump.manifest().shape;
    // Against head_dim first: where the step follows from the alignment, it is not to blame.
    budget.check(&shape, 1)?;
    measured_counts(shape.head_dim, options.step)?;
    // Curves are measured at multiples of the step; LeanK has none.
    budget.check(&shape, if options.method == Method::LeanK { 1 } else { options.step })?;
    budget.budget.limit(shape.layers * shape.kv_heads, shape.head_dim)?;
    let found = match options.method {
        Method::E2 | Method::E1 => spend(dump, options, budget, progress),
        method if budget.offer.is_coded() => {
            let why = format!("{method} allocates by quantile, in 16 bits only; use e2 or e1");
            return Err(Error::options("formats", why));
        }
        Method::Static => rank(dump, options, budget, progress),
        Method::LeanK => train(dump, options, budget, progress),
    };
    finish(dump, options, budget, found?)
}

/// What a method found.
struct Found {
    /// Kept channels per head.
    kept: Vec<Vec<u16>>,
    /// A score per channel.
    scores: Vec<f32>,
    allocation: Allocation,
}

impl Found {
    /// In 16 bits, with a summed loss.
    fn plain(kept: Vec<Vec<u16>>, scores: Vec<f32>, loss: f64) -> Self {
        let counts: Vec<usize> = kept.iter().map(Vec::len).collect();
        let precisions = vec![HeadPrecision::default(); counts.len()];
        Self { kept, scores, allocation: Allocation { counts, precisions, loss } }
    }
}

/// The exact allocation over curves.
fn spend(
    dump: &Dump,
    options: &LearnOptions,
    budget: &AllocateOptions,
    progress: OnProgress<'_>,
) -> Result<Found> {
    let options = LearnOptions { precisions: budget.offer.is_coded(), ..options.clone() };
    let curves = learn(dump, &options, progress)?;
    let allocation = allocate(&curves, &dump.manifest().shape, budget)?;
    let kept = curves.heads.iter().zip(&allocation.counts).map(|(head, &n)| head.kept(n)).collect();
    Ok(Found { kept, scores: curves.importance(), allocation })
}

/// The static scores' quantile.
fn rank(
    dump: &Dump,
    options: &LearnOptions,
    budget: &AllocateOptions,
    progress: OnProgress<'_>,
) -> Result<Found> {
    let heads = learn(dump, options, progress)?.heads;
    let scores: Vec<_> = heads.iter().map(|head| head.scores.clone()).collect();
    let counts = quantile_counts(&scores, &dump.manifest().shape, budget)?;
    let all = || heads.iter().zip(&counts);
    let loss = all().filter_map(|(head, &n)| head.loss(n)).sum();
    Ok(Found::plain(all().map(|(head, &n)| head.kept(n)).collect(), scores.concat(), loss))
}

/// LeanK's stages; see [`crate::leank`].
fn train(
    dump: &Dump,
    options: &LearnOptions,
    budget: &AllocateOptions,
    progress: OnProgress<'_>,
) -> Result<Found> {
    let run = Run::new(dump, options, progress)?;
    let (windows, seed) = (options.windows, options.seed);
    let diagonals =
        run.phase("choosing λ", "diagonal", |layer, head| leank::diagonal(layer, head, windows))?;
    let ratio = leank::ratio(budget.budget);
    let lambda = leank::lambda(&diagonals, ratio);
    let scales = run.phase("stage 1", &format!("scales-{ratio}"), |layer, head| {
        Trainer::new(layer, head, windows, seed).learn_scales(lambda)
    })?;
    let flat: Vec<Vec<f32>> = scales.into_iter().flatten().map(|own| own.0).collect();
    let shape = dump.manifest().shape;
    let counts = quantile_counts(&flat, &shape, budget)?;
    let exempt: Vec<_> = budget.exempt.iter().map(|layer| layer.0.to_string()).collect();
    let name =
        format!("budget {} align {} exempt {}", budget.budget, budget.alignment, exempt.join(","));
    let name = format!("refined-{}", name.trim_end().replace([' ', ','], "-"));
    let trained: Vec<Trained> = run
        .phase("stage 2", &name, |layer, head| {
            let at = layer.layer().0 * shape.kv_heads + head.0;
            Trainer::new(layer, head, windows, seed ^ 1).refine(&flat[at], counts[at])
        })?
        .into_iter()
        .flatten()
        .collect();
    let loss = trained.iter().map(|own| own.loss).sum();
    let scores = trained.iter().flat_map(|own| own.scales.clone()).collect();
    Ok(Found::plain(trained.into_iter().map(|own| own.kept).collect(), scores, loss))
}

fn finish(
    dump: &Dump,
    options: &LearnOptions,
    budget: &AllocateOptions,
    Found { kept, scores, allocation }: Found,
) -> Result<Learned> {
    let manifest = dump.manifest();
    let shape = manifest.shape;
    let mut exempt: Vec<_> = budget.exempt.iter().map(|layer| layer.0).collect();
    exempt.sort_unstable();
    exempt.dedup();
    let info = MaskInfo {
        model_id: Some(manifest.model_id.clone()),
        fingerprint: Some(manifest.fingerprint.clone()),
        windows: Some(options.windows),
        alignment: Some(budget.alignment),
        method: Some(options.method.to_string()),
        budget: Some(match budget.offer.is_coded() {
            true => format!("{}, formats {}", budget.budget, budget.offer),
            false => budget.budget.to_string(),
        }),
        // Only the Fisher probe measures in nats.
        predicted_kl: (manifest.probe == Probe::Fisher).then(|| allocation.predicted_kl()),
        seed: Some(options.seed),
        exempt_layers: exempt,
        created_by: Some(concat!("leank ", env!("CARGO_PKG_VERSION")).into()),
        runs: manifest.run.iter().cloned().chain(own_run(dump, options)).collect(),
    };
    let heads = kept
        .into_iter()
        .map(|kept| ChannelMask::new(shape.head_dim, kept))
        .collect::<Result<_, _>>()?;
    let mask = ModelMask::new(shape.layers, shape.kv_heads, shape.head_dim, heads)?
        .with_scores(scores)?
        .with_precisions(allocation.precisions.clone())?
        .with_info(info)?;
    let with_middle = manifest.positions_with_middle(options.windows);
    Ok(Learned { mask, allocation, without_middle: manifest.valid_positions() - with_middle })
}

/// The learning run's record, with the dump among its inputs.
fn own_run(dump: &Dump, options: &LearnOptions) -> Option<RunRecord> {
    let mut run = options.run.clone()?;
    let name = dump.dir().file_name().unwrap_or_default().to_string_lossy().into_owned();
    run.inputs.push(InputRecord { role: "dump".into(), name, sha256: dump.id().to_owned() });
    Some(run)
}

/// Refuses windows that leave nothing to learn from.
fn check_windows(manifest: &Manifest, windows: Windows) -> Result<()> {
    if manifest.positions_with_middle(windows) > 0 {
        return Ok(());
    }
    let seen = |own: &SequenceInfo| own.valid.last().map(|&last| own.prefix + last as usize + 1);
    let tokens = manifest.sequences.iter().filter_map(seen).max().unwrap_or(0);
    Err(Error::NoMiddle { windows, tokens })
}

/// Where the records of losses in precisions lie, below those of the curves.
const PRECISIONS: &str = "precisions";

/// A learning run: its layers, its threads and where its records go.
struct Run<'a> {
    dump: &'a Dump,
    directory: PathBuf,
    layers: Range<usize>,
    pool: rayon::ThreadPool,
    progress: OnProgress<'a>,
}

impl<'a> Run<'a> {
    fn new(dump: &'a Dump, options: &LearnOptions, progress: OnProgress<'a>) -> Result<Self> {
        measured_counts(dump.manifest().shape.head_dim, options.step)?;
        check_windows(dump.manifest(), options.windows)?;
        let threads = options.threads;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = pool.map_err(|e| Error::Threads { threads, why: e.to_string() })?;
        let records = options.records.clone().unwrap_or_else(|| dump.dir().join("learn"));
        let LearnOptions { method, windows: Windows { sink, recent }, step, seed, .. } = options;
        // The query's own token is always kept whole: both mean the same.
        let recent = recent.max(&1);
        // What a method does not depend on is not in its name.
        let own = match method {
            Method::LeanK => format!("seed{seed}"),
            _ => format!("step{step}"),
        };
        let id = &dump.id()[..12];
        let directory = records.join(format!("{method}-sink{sink}-recent{recent}-{own}-{id}"));
        let layers = 0..dump.manifest().shape.layers;
        Ok(Self { dump, directory, layers, pool, progress })
    }

    /// Losses of all heads in all precisions, along their curves.
    fn precisions(
        &self,
        heads: &[Vec<HeadCurve>],
        windows: Windows,
    ) -> Result<Vec<PrecisionCurve>> {
        let found = self.phase("formats", PRECISIONS, |layer, head| {
            let curve = &heads[layer.layer().0 - self.layers.start][head.0];
            measure_precisions(&mut HeadEvaluator::new(layer, head, windows), curve)
        })?;
        self.check_order(&found, heads)?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Refuses losses in precisions that were measured along other curves than these.
    fn check_order(&self, found: &[Vec<PrecisionCurve>], heads: &[Vec<HeadCurve>]) -> Result<()> {
        let mut all = found.iter().flatten().zip(heads.iter().flatten());
        let Some(at) = all.position(|(own, curve)| !own.is_of(curve)) else { return Ok(()) };
        let layer = Layer(self.layers.start + at / self.dump.manifest().shape.kv_heads);
        let path = self.directory.join(PRECISIONS).join(record_name(layer));
        let why = "it was measured along another order of channels".into();
        Err(Error::Record { path, why })
    }

    /// What a phase left in `directory`, by layer and head; `None` where a layer is missing.
    fn recorded<T: HeadResult>(&self, directory: &str) -> Result<Option<Vec<Vec<T>>>> {
        self.phase_in("records", directory).recorded()
    }

    fn phase<T: HeadResult>(
        &self,
        name: &'static str,
        directory: &str,
        task: impl Fn(&LayerDump<'_>, KvHead) -> Result<T> + Sync,
    ) -> Result<Vec<Vec<T>>> {
        self.phase_in(name, directory).run(task)
    }

    fn phase_in(&self, name: &'static str, directory: &str) -> Phase<'_> {
        Phase {
            dump: self.dump,
            name,
            directory: self.directory.join(directory),
            layers: self.layers.clone(),
            pool: &self.pool,
            progress: self.progress,
        }
    }
}
