//! The error of attention against f64, on random data and on activations of a real model.

use std::{fmt, path::Path, sync::Arc};

use leank_core::{
    Backend as _, Cache as _, CacheConfig, Dtype, HostView, HostViewMut, Layer, ModelShape,
    StepEntry, ViewShape, oracle::Attention,
};
use leank_cpu::{Cpu, Isa, Serial};
use leank_train::{
    dump::{Dump, HeadData},
    rng::Rng,
};
use serde::Serialize;

use crate::{Error, Result, cpu::machine, setting::HeadShape};

/// Tokens per step while a cache is filled.
const CHUNK: usize = 1024;

/// What is measured: every context in every type on every instruction set.
#[derive(Clone, Debug)]
pub struct AccuracyOptions<'a> {
    /// Head shape of random data.
    pub shape: HeadShape,
    /// A dump of a model's activations, in place of random data.
    pub dump: Option<&'a Path>,
    /// Tokens that the query sees.
    pub contexts: Vec<usize>,
    /// Storage types.
    pub dtypes: Vec<Dtype>,
    /// Kernels.
    pub isas: Vec<Isa>,
}

/// One KV head's attention: one query token.
struct Head {
    head_dim: usize,
    /// `[group, head_dim]`
    q: Vec<f32>,
    /// `[tokens, head_dim]`
    k: Vec<f32>,
    v: Vec<f32>,
}

/// What was measured, and where.
#[derive(Clone, Debug, Serialize)]
pub struct AccuracyReport {
    /// The processor, as the system names it.
    pub machine: String,
    /// Where the data is from.
    pub data: String,
    /// KV heads that were measured.
    pub heads: usize,
    /// In the order of the options: contexts, types, instruction sets.
    pub rows: Vec<AccuracyRow>,
}

/// Errors of one setting, relative L2 of the output over all heads.
#[derive(Clone, Debug, Serialize)]
pub struct AccuracyRow {
    /// Tokens that the query sees.
    pub context: usize,
    /// Storage type.
    pub dtype: Dtype,
    /// Kernel.
    pub isa: String,
    /// Against f64 on K and V as they are stored: the error of the arithmetic.
    pub arithmetic: f64,
    /// The largest of a head's.
    pub arithmetic_worst: f64,
    /// Against f64 on K and V as they were given: rounding for storage counts too.
    pub whole: f64,
}

/// Runs the measurement. `progress` is called with each row as it is done.
///
/// # Errors
/// [`Error::Option`] for an empty list, a context of no tokens or one that the dump has not;
/// [`Error::Dump`] for a dump that cannot be read; [`Error::Cache`] for what the backend refuses.
pub fn measure(
    options: &AccuracyOptions<'_>,
    mut progress: impl FnMut(&AccuracyRow),
) -> Result<AccuracyReport> {
    for (what, count) in [
        ("contexts", options.contexts.iter().filter(|&&context| context > 0).count()),
        ("storage types", options.dtypes.len()),
        ("instruction sets", options.isas.len()),
    ] {
        if count == 0 {
            return Err(Error::option(what, "at least one", "none"));
        }
    }
    let longest = options.contexts.iter().copied().max().unwrap_or_default();
    let heads = match options.dump {
        Some(path) => dumped(path, longest)?,
        None => random(options.shape, longest),
    };
    let mut rows = Vec::new();
    for &context in &options.contexts {
        let exact: Vec<Vec<f64>> =
            heads.iter().map(|head| oracle(head, context, f64::from)).collect::<Result<_>>()?;
        for &dtype in &options.dtypes {
            let stored = |head| oracle(head, context, |x| f64::from(dtype.round(x)));
            let stored = heads.iter().map(stored).collect::<Result<Vec<_>>>()?;
            for &isa in &options.isas {
                let cpu = Cpu::with_executor(Arc::new(Serial)).with_isa(isa)?;
                let got = heads.iter().map(|head| attend(&cpu, head, context, dtype));
                let got = got.collect::<Result<Vec<_>>>()?;
                let each = stored.iter().zip(&got).map(|(want, got)| relative([(want, got)]));
                let row = AccuracyRow {
                    context,
                    dtype,
                    isa: isa.to_string(),
                    arithmetic: relative(stored.iter().zip(&got)),
                    arithmetic_worst: each.fold(0.0, f64::max),
                    whole: relative(exact.iter().zip(&got)),
                };
                progress(&row);
                rows.push(row);
            }
        }
    }
    let data = match options.dump {
        Some(path) => format!("activations of {}", path.display()),
        None => format!("N(0, 1), shape {}", options.shape),
    };
    Ok(AccuracyReport { machine: machine(), data, heads: heads.len(), rows })
}

/// Random heads of a layer.
fn random(shape: HeadShape, tokens: usize) -> Vec<Head> {
    let mut random = Rng::new(0);
    let mut normal = |rows: usize| -> Vec<f32> {
        (0..rows * shape.head_dim).map(|_| random.normal() as f32).collect()
    };
    let group = shape.query_heads / shape.kv_heads;
    let head = |_| Head {
        head_dim: shape.head_dim,
        q: normal(group),
        k: normal(tokens),
        v: normal(tokens),
    };
    (0..shape.kv_heads).map(head).collect()
}

/// The KV heads of every layer of a dump. A context takes K and V of as many sequences, one after
/// the other, as it needs, and the last query of the last of them.
fn dumped(path: &Path, tokens: usize) -> Result<Vec<Head>> {
    let dump = Dump::open(path)?;
    let manifest = dump.manifest();
    let shape = manifest.shape;
    let mut heads = Vec::new();
    let mut data = HeadData::default();
    for layer in shape.layer_indices() {
        let file = dump.layer(layer)?;
        for head in shape.kv_head_indices() {
            let mut own =
                Head { head_dim: shape.head_dim, q: Vec::new(), k: Vec::new(), v: Vec::new() };
            for sequence in 0..manifest.sequences.len() {
                file.read(head, sequence, &mut data)?;
                own.k.extend_from_slice(&data.k);
                own.v.extend_from_slice(&data.v);
                own.q.clear();
                let positions = manifest.positions;
                for queries in data.q.chunks_exact(positions * shape.head_dim) {
                    own.q.extend_from_slice(&queries[(positions - 1) * shape.head_dim..]);
                }
                if own.k.len() >= tokens * shape.head_dim {
                    break;
                }
            }
            let found = own.k.len() / shape.head_dim;
            if found < tokens {
                let found = format!("{tokens}; the dump's sequences have {found} tokens together");
                return Err(Error::option("context", "one that the dump covers", found));
            }
            heads.push(own);
        }
    }
    Ok(heads)
}

impl Head {
    /// The last `context` rows of K or V.
    fn last<'a>(&self, rows: &'a [f32], context: usize) -> &'a [f32] {
        &rows[rows.len() - context * self.head_dim..]
    }

    fn config(&self, dtype: Dtype) -> Result<CacheConfig> {
        let shape = ModelShape::new(1, self.q.len() / self.head_dim, 1, self.head_dim)?;
        Ok(CacheConfig { dtype, ..CacheConfig::dense(shape)? })
    }
}

fn oracle(head: &Head, context: usize, widen: impl Fn(f32) -> f64) -> Result<Vec<f64>> {
    let config = head.config(Dtype::F32)?;
    let wide = |rows| head.last(rows, context).iter().map(|&x| widen(x)).collect::<Vec<_>>();
    let (keys, values) = (wide(&head.k), wide(&head.v));
    let queries: Vec<f64> = head.q.iter().copied().map(f64::from).collect();
    let attention = Attention {
        masks: config.mask.layer(Layer(0)),
        query_heads: config.shape.query_heads,
        windows: config.windows,
        block: config.block,
        scale: f64::from(config.scale()),
        soft_cap: None,
        start: context - 1,
        keys: &keys,
        values: &values,
        queries: &queries,
    };
    Ok(attention.output())
}

fn attend(cpu: &Cpu, head: &Head, context: usize, dtype: Dtype) -> Result<Vec<f32>> {
    let mut cache = cpu.create(head.config(dtype)?)?;
    let sequence = cache.add_sequence();
    let (k, v) = (head.last(&head.k, context), head.last(&head.v, context));
    let head_dim = head.head_dim;
    let append = |cache: &mut leank_cpu::CpuCache, first: usize, tokens: usize| -> Result<()> {
        let rows = ViewShape::contiguous(tokens, 1, head_dim);
        let range = first * head_dim..(first + tokens) * head_dim;
        let (k, v) = (HostView::new(&k[range.clone()], rows)?, HostView::new(&v[range], rows)?);
        Ok(cache.append(Layer(0), k, v)?)
    };
    for first in (0..context - 1).step_by(CHUNK) {
        let tokens = CHUNK.min(context - 1 - first);
        cache.plan(&[StepEntry::store(sequence, tokens)])?;
        append(&mut cache, first, tokens)?;
        cache.commit()?;
    }
    cache.plan(&[StepEntry::decode(sequence, 1)])?;
    append(&mut cache, context - 1, 1)?;
    let rows = ViewShape::contiguous(1, head.q.len() / head_dim, head_dim);
    let mut out = vec![f32::NAN; head.q.len()];
    let (q, to) = (HostView::new(&head.q[..], rows)?, HostViewMut::new(&mut out[..], rows)?);
    cache.attend(Layer(0), q, to)?;
    Ok(out)
}

/// `‖got − want‖ / ‖want‖` over all pairs.
fn relative<'a>(pairs: impl IntoIterator<Item = (&'a Vec<f64>, &'a Vec<f32>)>) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (want, got) in pairs {
        for (want, &got) in want.iter().zip(got) {
            error += (f64::from(got) - want).powi(2);
            norm += want * want;
        }
    }
    (error / norm).sqrt()
}

/// The heading of the rows.
pub const HEADER: &str = "context dtype isa          arithmetic  worst head      whole";

impl fmt::Display for AccuracyRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { context, isa, arithmetic, arithmetic_worst, whole, .. } = self;
        let dtype = self.dtype.to_string();
        write!(
            f,
            "{context:>7} {dtype:<5} {isa:<12} {arithmetic:>10.2e} {arithmetic_worst:>11.2e} {whole:>10.2e}"
        )
    }
}

impl fmt::Display for AccuracyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}; {}, {} KV heads\n\n{HEADER}", self.machine, self.data, self.heads)?;
        self.rows.iter().try_for_each(|row| writeln!(f, "{row}"))
    }
}

#[cfg(test)]
mod tests {
    use leank_train::synthetic::Synthetic;

    use super::*;

    fn options() -> AccuracyOptions<'static> {
        AccuracyOptions {
            shape: HeadShape { query_heads: 4, kv_heads: 2, head_dim: 64 },
            dump: None,
            contexts: vec![65, 300],
            dtypes: Dtype::ALL.to_vec(),
            isas: vec![Isa::Portable],
        }
    }

    #[test]
    fn errors_follow_the_type() {
        let mut seen = 0;
        let report = measure(&options(), |_| seen += 1).unwrap();
        assert_eq!((report.rows.len(), seen), (6, 6));
        for row in &report.rows {
            assert!(row.arithmetic > 0.0 && row.arithmetic < 1e-5, "{row}");
            assert!(row.arithmetic_worst >= row.arithmetic * 0.99, "{row}");
            let storage = match row.dtype {
                Dtype::F32 => 0.0..1e-5,
                Dtype::F16 => 1e-5..2e-3,
                Dtype::Bf16 => 1e-3..2e-2,
            };
            assert!(storage.contains(&row.whole), "{row}");
        }
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        for bad in [
            AccuracyOptions { contexts: vec![], ..options() },
            AccuracyOptions { dtypes: vec![], ..options() },
            AccuracyOptions { isas: vec![], ..options() },
        ] {
            assert!(matches!(measure(&bad, |_| ()).unwrap_err(), Error::Option { .. }));
        }
        let missing = Path::new("no such dump");
        let bad = AccuracyOptions { dump: Some(missing), ..options() };
        let error = measure(&bad, |_| ()).unwrap_err();
        assert!(error.to_string().contains("no such dump"), "{error}");
    }

    #[test]
    fn a_dump_is_measured_as_far_as_it_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("dump");
        let synthetic = Synthetic {
            shape: ModelShape::new(2, 4, 2, 16).unwrap(),
            prefixes: vec![60, 100],
            positions: 4,
            draws: 1,
            dtype: Dtype::F32,
            seed: 3,
        };
        synthetic.write(&path).unwrap();
        // One sequence has 64 tokens, both have 168.
        let options = AccuracyOptions { dump: Some(&path), contexts: vec![64, 168], ..options() };
        let report = measure(&options, |_| ()).unwrap();
        assert_eq!((report.heads, report.rows.len()), (4, 6));
        assert!(report.rows.iter().all(|row| row.arithmetic < 1e-5), "{report}");
        let error = measure(&AccuracyOptions { contexts: vec![169], ..options }, |_| ());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("169") && error.contains("168 tokens"), "{error}");
    }
}
