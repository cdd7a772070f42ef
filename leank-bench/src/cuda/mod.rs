//! Decode attention of one layer on a CUDA device, dense and lean, beside its read bandwidth.

mod device;
mod filled;

use std::{collections::BTreeMap, fmt, str::FromStr, time::Instant};

use leank_core::{
    Backend as _, Cache as _, CacheConfig, ChannelMask, DEFAULT_BLOCK, Dtype, KvHead, Layer,
    ModelMask, ModelShape, Planner,
};
use leank_cuda::Cuda;
use leank_train::rng::Rng;
use serde::Serialize;

use crate::{
    Error, Result,
    setting::{DeviceFormats, Published, with_format},
};
pub(crate) use device::{Device, capture, driver, give_up_events, seconds};
use filled::{Filled, Filler};

/// Sequences of one length: `BATCHxCONTEXT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Batch {
    /// Sequences.
    pub sequences: usize,
    /// Tokens that the query of each sees, itself included.
    pub context: usize,
}

impl FromStr for Batch {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let numbers = || {
            let (sequences, context) = text.split_once('x')?;
            Some((sequences.parse().ok()?, context.parse().ok()?))
        };
        match numbers() {
            Some((sequences, context)) if sequences > 0 && context > 1 => {
                Ok(Self { sequences, context })
            }
            _ => Err(Error::option(
                "batch",
                "SEQUENCESxCONTEXT such as 8x32768",
                format!("`{text}`"),
            )),
        }
    }
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Models.
    pub models: Vec<Published>,
    /// Batches.
    pub batches: Vec<Batch>,
    /// Storage type: f16 or bf16.
    pub dtype: Dtype,
    /// Formats of lean blocks, each in a cache of its own; none: dense caches alone.
    pub formats: Vec<DeviceFormats>,
    /// Most different layers of a mask, at equal distances; all by default.
    pub layers: Option<usize>,
    /// Sequences of lengths between 1024 and 65536, to be compared with as many of one length.
    pub mixed: Option<usize>,
    /// Rounds behind each median.
    pub rounds: usize,
    /// Milliseconds per round.
    pub millis: f64,
}

/// One layer of a mask, or several alike.
#[derive(Clone, Debug, Serialize)]
pub struct LayerRow {
    /// Kept channels per KV head.
    pub kept: Vec<usize>,
    /// Layers of the model with these counts.
    pub layers: usize,
    /// Microseconds per call.
    pub us: f64,
    /// Bytes of K and V that a call reads.
    pub bytes: f64,
}

/// One batch of one model.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The model.
    pub model: Published,
    /// The batch.
    pub batch: Batch,
    /// Microseconds per call on a cache that prunes nothing.
    pub dense_us: f64,
    /// Bytes that such a call reads.
    pub dense_bytes: f64,
    /// Microseconds that planning a step takes on the device; contained, divided by the model's
    /// layers, in all times.
    pub plan_us: f64,
    /// Lean caches, in the order of the formats.
    pub lean: Vec<LeanRow>,
}

/// Lean caches of one format.
#[derive(Clone, Debug, Serialize)]
pub struct LeanRow {
    /// Formats of lean blocks, as in `k8v8`.
    pub formats: String,
    /// Microseconds per layer, mean over the layers that were measured.
    pub us: f64,
    /// Bytes that a layer reads, mean over the layers.
    pub bytes: f64,
    /// Each different layer.
    pub layers: Vec<LayerRow>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The device.
    pub device: String,
    /// From nothing to a first cache.
    #[serde(flatten)]
    pub start: Start,
    /// 10⁹ bytes per second of a plain read.
    pub read_gb_per_s: f64,
    /// Storage type.
    pub dtype: Dtype,
    /// Rounds behind each median.
    pub rounds: usize,
    /// One per model and batch.
    pub rows: Vec<Row>,
    /// Sequences of different lengths.
    pub mixed: Vec<Mixed>,
}

/// Sequences of different lengths against as many of one length, that of their mean.
#[derive(Clone, Debug, Serialize)]
pub struct Mixed {
    /// The model whose heads are taken.
    pub model: Published,
    /// Whether the cache is lean, with the mask of a layer in the model's middle.
    pub lean: bool,
    /// Sequences.
    pub sequences: usize,
    /// Microseconds per call, lengths between 1024 and 65536 tokens.
    pub mixed_us: f64,
    /// Microseconds per call, one length.
    pub equal_us: f64,
    /// Time per byte, mixed over equal.
    pub ratio: f64,
}

impl fmt::Display for Mixed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { model, sequences, mixed_us, equal_us, ratio, .. } = self;
        let cache = if self.lean { "lean" } else { "dense" };
        write!(
            f,
            "{model} {cache}, {sequences} sequences: {mixed_us:.1} us of mixed lengths, {equal_us:.1} us of \
             one; per byte {ratio:.3}"
        )
    }
}

/// The heading of [`Row`]'s lines.
pub const HEADER: &str =
    "model  batch      cache        us    GB/s of read  dense/lean time (bytes)  plan us";

impl Row {
    /// The lines of the row.
    #[must_use]
    pub fn lines(&self, read_gb_per_s: f64) -> String {
        let line = |cache: &str, us: f64, bytes: f64, last: String| {
            let batch = format!("{}x{}", self.batch.sequences, self.batch.context);
            let rate = bytes / us / 1e3;
            let share = 100.0 * rate / read_gb_per_s;
            let model = self.model.to_string();
            format!(
                "{model:<6} {batch:<10} {cache:<6} {us:>8.1} {rate:>7.0} {share:>5.1} %  {last}\n"
            )
        };
        let plan = format!("{:>30.1}", self.plan_us);
        let mut lines = line("dense", self.dense_us, self.dense_bytes, plan);
        for LeanRow { formats, us, bytes, .. } in &self.lean {
            let (time, size) = (self.dense_us / us, self.dense_bytes / bytes);
            lines += &line(formats, *us, *bytes, format!("{time:.3} ({size:.3})"));
        }
        lines
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}; reads {:.0} GB/s", self.device, self.read_gb_per_s)?;
        writeln!(f, "{}", self.start)?;
        writeln!(f, "{}, median of {} rounds\n\n{HEADER}", self.dtype, self.rounds)?;
        self.rows.iter().try_for_each(|row| f.write_str(&row.lines(self.read_gb_per_s)))?;
        self.mixed.iter().try_for_each(|mixed| writeln!(f, "{mixed}"))
    }
}

/// Least bytes that calls go through before they come back to the same: many times the L2 cache.
const COLD_BYTES: f64 = 24.0 * (50 << 20) as f64;

/// Seconds from nothing to a first cache of Llama's heads.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Start {
    /// All of it.
    pub start_s: f64,
    /// Of it, the backend: the driver and the device's context.
    pub backend_s: f64,
}

impl fmt::Display for Start {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start_s, backend_s } = self;
        write!(
            f,
            "ready after {start_s:.3} s: driver and context {backend_s:.3} s, kernels and tables {:.3} s",
            start_s - backend_s
        )
    }
}

/// The backend on a device, when a first cache has stood. Its kernels are compiled where no earlier run
/// left them on disk.
///
/// # Errors
/// Those of the backend.
pub fn start(device: usize) -> Result<(Cuda, Start)> {
    let begin = Instant::now();
    let cuda = Cuda::new(device)?;
    let backend_s = begin.elapsed().as_secs_f64();
    let (shape, _) = Published::Llama.model()?;
    let config = CacheConfig::dense(ModelShape { layers: 1, ..shape })?;
    cuda.create(CacheConfig { dtype: Dtype::Bf16, ..config })?;
    Ok((cuda, Start { start_s: begin.elapsed().as_secs_f64(), backend_s }))
}

/// Measures; `start` is what [`start`] took, `progress` gets each row as it is done.
///
/// # Errors
/// Those of the backend and the device.
pub fn measure(
    cuda: &Cuda,
    start: Start,
    options: &CudaOptions,
    mut progress: impl FnMut(&Row, f64),
) -> Result<Report> {
    let device = Device::new(cuda.stream())?;
    let read = device.read_bandwidth()? / 1e9;
    let mut rows = Vec::new();
    for &batch in &options.batches {
        for &model in &options.models {
            let row = measure_row(cuda, &device, options, model, batch)?;
            progress(&row, read);
            rows.push(row);
        }
    }
    let mut mixed = Vec::new();
    if let Some(sequences) = options.mixed {
        for &model in &options.models {
            for lean in [false, true] {
                mixed.push(measure_mixed(cuda, &device, options, model, (sequences, lean))?);
            }
        }
    }
    Ok(Report {
        mixed,
        device: cuda.device().to_string(),
        start,
        read_gb_per_s: read,
        dtype: options.dtype,
        rounds: options.rounds,
        rows,
    })
}

/// Layers that keep equally many channels, whatever the order of heads: kept counts, a layer, how
/// many.
fn different_layers(shape: ModelShape, mask: &ModelMask) -> Vec<(Vec<usize>, Layer, usize)> {
    let mut found: BTreeMap<Vec<usize>, (Layer, usize)> = BTreeMap::new();
    for layer in shape.layer_indices() {
        let mut kept: Vec<usize> = mask.layer(layer).iter().map(ChannelMask::kept_count).collect();
        kept.sort_unstable();
        found.entry(kept).or_insert((layer, 0)).1 += 1;
    }
    found.into_iter().map(|(kept, (layer, count))| (kept, layer, count)).collect()
}

/// A cache of one layer of the model: dense, or lean in these formats.
fn one_layer(
    options: &CudaOptions,
    model: Published,
    lean: Option<(Layer, DeviceFormats)>,
) -> Result<CacheConfig> {
    let (shape, mask) = model.model()?;
    let one = ModelShape { layers: 1, ..shape };
    let config = match lean {
        None => CacheConfig::dense(one)?,
        Some((layer, formats)) => {
            let heads = (0..shape.kv_heads).map(|head| mask.head(layer, KvHead(head)).clone());
            let mask = ModelMask::new(1, shape.kv_heads, shape.head_dim, heads.collect())?;
            let config = with_format(CacheConfig::new(one, mask)?, formats.format(options.dtype));
            CacheConfig { windows: Published::WINDOWS, ..config }
        }
    };
    Ok(CacheConfig { dtype: options.dtype, ..config })
}

fn measure_mixed(
    cuda: &Cuda,
    device: &Device,
    options: &CudaOptions,
    model: Published,
    (sequences, lean): (usize, bool),
) -> Result<Mixed> {
    let (shape, _) = model.model()?;
    let middle = (Layer(shape.layers / 2), DeviceFormats::default());
    let config = one_layer(options, model, lean.then_some(middle))?;
    let mut filler = Filler { cuda, device, random: Rng::new(sequences as u64) };
    let blocks: Vec<usize> = (0..sequences).map(|_| 16 + filler.random.below(1009)).collect();
    let mixed: Vec<usize> = blocks.iter().map(|blocks| blocks * DEFAULT_BLOCK).collect();
    let mean = blocks.iter().sum::<usize>() / sequences.max(1) * DEFAULT_BLOCK;
    let mut time = |lengths: &[usize]| -> Result<(f64, f64)> {
        let mut cache = filler.fill(config.clone(), lengths)?;
        let seconds = device.time_graph(options.millis, options.rounds, || cache.attend())?;
        let planner = Planner::new(&config, cuda.layout_rules())?;
        let footprints = lengths.iter().map(|&length| planner.footprint(length - 1));
        let bytes = footprints.map(|it| Ok(it?.bytes as f64)).sum::<Result<f64>>()?;
        Ok((seconds, bytes))
    };
    let (mixed_seconds, mixed_bytes) = time(&mixed)?;
    let (equal_seconds, equal_bytes) = time(&vec![mean; sequences])?;
    Ok(Mixed {
        model,
        lean,
        sequences,
        mixed_us: mixed_seconds * 1e6,
        equal_us: equal_seconds * 1e6,
        ratio: mixed_seconds / mixed_bytes / (equal_seconds / equal_bytes),
    })
}

fn measure_row(
    cuda: &Cuda,
    device: &Device,
    options: &CudaOptions,
    model: Published,
    batch: Batch,
) -> Result<Row> {
    let (shape, mask) = model.model()?;
    let seed = (batch.sequences * batch.context) as u64;
    let mut filler = Filler { cuda, device, random: Rng::new(seed) };
    let lengths = vec![batch.context; batch.sequences];

    let dense = one_layer(options, model, None)?;
    let dense_bytes = bytes(cuda, &dense, batch)?;
    let sets = ((COLD_BYTES / dense_bytes).ceil() as usize).clamp(2, 24);
    let mut time = |config: &CacheConfig| -> Result<(f64, f64)> {
        let fill = |_| filler.fill(config.clone(), &lengths);
        let mut caches = (0..sets).map(fill).collect::<Result<Vec<_>>>()?;
        let plan = time_plan(device, &mut caches[0])?;
        let seconds = device.time_graph(options.millis, options.rounds, || {
            caches.iter_mut().try_for_each(Filled::attend)
        })?;
        Ok((seconds / sets as f64, plan))
    };
    let (dense_seconds, plan) = time(&dense)?;
    let share = plan / shape.layers as f64;

    let mut lean = Vec::new();
    for &formats in &options.formats {
        let all = different_layers(shape, &mask);
        let most = options.layers.unwrap_or(all.len()).clamp(1, all.len());
        let mut layers = Vec::new();
        for i in 0..most {
            let (kept, layer, count) = &all[i * all.len() / most];
            let config = one_layer(options, model, Some((*layer, formats)))?;
            layers.push(LayerRow {
                kept: kept.clone(),
                layers: *count,
                us: (time(&config)?.0 + share) * 1e6,
                bytes: bytes(cuda, &config, batch)?,
            });
        }
        let count: usize = layers.iter().map(|row| row.layers).sum();
        let mean = |value: fn(&LayerRow) -> f64| {
            let sum: f64 = layers.iter().map(|row| value(row) * row.layers as f64).sum();
            sum / count as f64
        };
        let (us, bytes) = (mean(|row| row.us), mean(|row| row.bytes));
        lean.push(LeanRow { formats: formats.to_string(), us, bytes, layers });
    }
    Ok(Row {
        model,
        batch,
        dense_us: (dense_seconds + share) * 1e6,
        dense_bytes,
        plan_us: plan * 1e6,
        lean,
    })
}

/// Bytes of K and V of the batch.
fn bytes(cuda: &Cuda, config: &CacheConfig, batch: Batch) -> Result<f64> {
    let planner = Planner::new(config, cuda.layout_rules())?;
    // While the new token attends, the blocks that its step will pack are still whole.
    let footprint = planner.footprint(batch.context - 1)?;
    Ok(footprint.bytes as f64 * batch.sequences as f64)
}

/// Seconds that a plan takes on the device.
fn time_plan(device: &Device, filled: &mut Filled) -> Result<f64> {
    let filled = std::cell::RefCell::new(filled);
    let busy = || (0..20).try_for_each(|_| filled.borrow_mut().attend());
    let plan = || {
        filled.borrow_mut().cache.cancel();
        filled.borrow_mut().plan()
    };
    let append = || filled.borrow_mut().append();
    device.time_behind(7, || append().and_then(|()| busy()), plan).and_then(|time| {
        append()?;
        Ok(time)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_parse() {
        let batch: Batch = "8x32768".parse().unwrap();
        assert_eq!((batch.sequences, batch.context), (8, 32768));
        for text in ["", "8", "0x64", "8x1", "x", "8x-1"] {
            assert!(text.parse::<Batch>().is_err(), "{text}");
        }
    }

    #[test]
    fn every_layer_counts_once() {
        for model in Published::ALL {
            let (shape, mask) = model.model().unwrap();
            let layers = different_layers(shape, &mask);
            assert_eq!(layers.iter().map(|(_, _, count)| count).sum::<usize>(), shape.layers);
            assert!(layers.len() > shape.layers / 2);
        }
    }

    #[test]
    fn a_row_says_what_was_measured() {
        let row = Row {
            model: Published::Llama,
            batch: Batch { sequences: 8, context: 32768 },
            dense_us: 350.0,
            dense_bytes: 1.05e9,
            plan_us: 6.0,
            lean: vec![LeanRow {
                formats: "k8v8".into(),
                us: 200.0,
                bytes: 6e8,
                layers: Vec::new(),
            }],
        };
        let words = row.lines(3200.0).split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(
            words,
            "llama 8x32768 dense 350.0 3000 93.8 % 6.0 llama 8x32768 k8v8 200.0 3000 93.8 % 1.750 (1.750)"
        );
    }
}
