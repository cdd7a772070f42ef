//! A cache under test together with what is known about it.

use std::collections::HashMap;

use leank_core::{
    Backend, Cache, CacheConfig, Error, HeadFormat, KvHead, Layer, LeanFormat, Result, SequenceId,
    StepEntry, Tensor, blocks::is_lean, oracle::Attention, quant::round_trip,
};

use crate::{CacheOf, Case, Kind, Load, Rows, Subject, data::activation, rounding_error};

/// A cache and its sequences. A sequence has a *name*, which decides its activations, so that two
/// worlds can hold the same tokens.
pub(crate) struct World<'s, S: Subject> {
    pub(crate) subject: &'s S,
    pub(crate) config: CacheConfig,
    pub(crate) cache: CacheOf<S>,
    pub(crate) sequences: Vec<(SequenceId, usize)>,
    /// Of names that did not begin with an empty sequence.
    pub(crate) histories: HashMap<usize, History>,
    /// One activation that is another one.
    pub(crate) stain: Option<Stain>,
    /// How often the system refused memory.
    pub(crate) refused: usize,
    seed: u64,
}

/// An activation that is not what it would be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stain {
    pub(crate) kind: Kind,
    /// Of which sequence.
    pub(crate) name: usize,
    /// Layer, position, index into the row.
    pub(crate) at: [usize; 3],
    pub(crate) value: f32,
}

/// What a name takes over from an earlier one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct History {
    /// The earlier name.
    pub(crate) from: usize,
    /// Its first tokens, which are those of the new one.
    pub(crate) tokens: usize,
    /// Blocks before this index, those of the sink excepted, were lean when a truncation ended
    /// before them, and stay so.
    pub(crate) packed: usize,
}

/// Output rows of the attending tokens of one step: layer, sequence name, position, row
/// `[query heads, head_dim]`.
pub(crate) type Outputs = Vec<(Layer, usize, usize, Vec<f32>)>;

impl<'s, S: Subject> World<'s, S> {
    pub(crate) fn new(subject: &'s S, case: &Case) -> Self {
        Self::with_config(subject, case, case.config())
    }

    pub(crate) fn with_config(subject: &'s S, case: &Case, config: CacheConfig) -> Self {
        let (mut refused, stain) = (0, None);
        let create = || subject.backend().create(config.clone());
        let created = create().or_else(|error| match error {
            Error::SystemMemory { .. } => {
                refused += 1;
                create()
            }
            error => Err(error),
        });
        let cache = created.expect("the case is valid");
        let (sequences, histories, seed) = (Vec::new(), HashMap::new(), case.seed);
        let mut world = Self { subject, config, cache, sequences, histories, stain, refused, seed };
        for name in 0..case.sequences {
            world.add(name);
        }
        world
    }

    pub(crate) fn add(&mut self, name: usize) {
        self.sequences.push((self.cache.add_sequence(), name));
    }

    pub(crate) fn len(&self, sequence: usize) -> usize {
        self.cache.sequence_len(self.sequences[sequence].0).expect("it is there")
    }

    fn entries(&self, loads: &[Load]) -> Vec<StepEntry> {
        let entry = |load: &Load| StepEntry {
            sequence: self.sequences[load.sequence].0,
            tokens: load.tokens,
            attend: load.attend,
        };
        loads.iter().map(entry).collect()
    }

    /// Rows of the step's tokens in one layer.
    pub(crate) fn rows(&self, kind: Kind, layer: Layer, loads: &[Load]) -> Rows {
        let shape = self.config.shape;
        let heads = if kind == Kind::Query { shape.query_heads } else { shape.kv_heads };
        let mut data = Vec::new();
        for load in loads {
            let start = self.len(load.sequence);
            for position in start..start + load.tokens {
                let name = self.sequences[load.sequence].1;
                let element = |e| self.value(kind, name, [layer.0, position, e]);
                data.extend((0..heads * shape.head_dim).map(element));
            }
        }
        let tokens = loads.iter().map(|load| load.tokens).sum();
        Rows { data, tokens, heads, head_dim: shape.head_dim }
    }

    /// One activation of a sequence, at a layer, a position and an index into its row.
    fn value(&self, kind: Kind, mut name: usize, [layer, position, element]: [usize; 3]) -> f32 {
        while let Some(history) = self.histories.get(&name).filter(|it| position < it.tokens) {
            name = history.from;
        }
        let at = [layer, position, element];
        match self.stain {
            Some(stain) if (stain.kind, stain.name, stain.at) == (kind, name, at) => stain.value,
            _ => activation(self.seed, kind, [name, layer, position, element]),
        }
    }

    /// The index before which blocks are lean whatever the windows say.
    pub(crate) fn packed(&self, name: usize) -> usize {
        self.histories.get(&name).map_or(0, |history| history.packed)
    }

    /// Makes a call that takes memory. Where the system refuses it, nothing may have changed, and the call
    /// is made again.
    pub(crate) fn insist<T>(
        &mut self,
        mut call: impl FnMut(&mut CacheOf<S>) -> Result<T>,
    ) -> Result<T> {
        let before = self.cache.memory();
        match call(&mut self.cache) {
            Err(Error::SystemMemory { bytes, .. }) => {
                assert!(bytes > 0, "of nothing");
                self.refused += 1;
            }
            result => return result,
        }
        let after = self.cache.memory();
        assert_eq!((after.blocks, after.tokens), (before.blocks, before.tokens));
        let commit = self.cache.commit();
        assert!(matches!(commit, Err(Error::Order { .. })), "a step is under way: {commit:?}");
        call(&mut self.cache)
    }

    /// Plans the step and appends to and attends from every layer, without committing.
    pub(crate) fn begin(&mut self, loads: &[Load]) -> Result<Outputs> {
        let entries = self.entries(loads);
        self.insist(|cache| cache.plan(&entries))?;
        let mut outputs = Vec::new();
        for layer in self.config.shape.layer_indices() {
            let (k, v) = (self.rows(Kind::Key, layer, loads), self.rows(Kind::Value, layer, loads));
            self.subject.append(&mut self.cache, layer, &k, &v)?;
            let q = self.rows(Kind::Query, layer, loads);
            let out = self.subject.attend(&mut self.cache, layer, &q)?;
            let width = out.heads * out.head_dim;
            let mut rows = out.data.chunks_exact(width);
            for load in loads {
                let start = self.len(load.sequence);
                for (position, row) in (start..start + load.tokens).zip(&mut rows) {
                    if load.attend {
                        let name = self.sequences[load.sequence].1;
                        outputs.push((layer, name, position, row.to_vec()));
                    } else {
                        assert!(row.iter().all(|x| x.is_nan()), "a storing row was written");
                    }
                }
            }
        }
        Ok(outputs)
    }

    /// A whole step.
    pub(crate) fn step(&mut self, loads: &[Load]) -> Result<Outputs> {
        let outputs = self.begin(loads)?;
        self.cache.commit()?;
        Ok(outputs)
    }

    /// A whole step, checked against the oracle.
    pub(crate) fn checked_step(&mut self, loads: &[Load]) -> Outputs {
        let starts: Vec<usize> = loads.iter().map(|load| self.len(load.sequence)).collect();
        let outputs = self.step(loads).expect("the step is valid");
        for (load, start) in loads.iter().zip(starts) {
            if load.attend {
                let name = self.sequences[load.sequence].1;
                for layer in self.config.shape.layer_indices() {
                    self.check(layer, name, start..start + load.tokens, &outputs);
                }
            }
        }
        outputs
    }

    fn check(
        &self,
        layer: Layer,
        name: usize,
        positions: std::ops::Range<usize>,
        outputs: &Outputs,
    ) {
        let got: Vec<f32> = outputs
            .iter()
            .filter(|(l, n, p, _)| *l == layer && *n == name && positions.contains(p))
            .flat_map(|(_, _, _, row)| row.iter().copied())
            .collect();
        // A head's outputs depend on its own formats only.
        let bounds: Vec<_> =
            self.config.shape.kv_head_indices().map(|head| self.bounds(layer, head)).collect();
        let stored = self.oracle(layer, name, positions.clone(), true);
        let arithmetic = |head: usize| bounds[head].arithmetic;
        self.compare(&got, &stored, arithmetic, "the oracle on stored values");
        if self.stain.is_some() {
            return;
        }
        let exact = self.oracle(layer, name, positions, false);
        self.compare(&got, &exact, |head| bounds[head].storage, "the oracle on exact values");
    }

    /// How far outputs of a KV head's group may be off.
    fn bounds(&self, layer: Layer, head: KvHead) -> Bounds {
        let HeadFormat { k, v } = self.config.format(layer, head);
        let formats = [k, v, LeanFormat::Plain(self.config.dtype)];
        let largest = |bounds: [f64; 3]| bounds.into_iter().fold(0.0, f64::max);
        // Errors of a logit add up over the channels.
        let channels = (self.config.shape.head_dim as f64 / 128.0).max(1.0);
        let errors = formats.map(|format| match format {
            LeanFormat::Plain(dtype) => self.subject.arithmetic_error(dtype),
            _ => self.subject.coded_arithmetic_error(),
        });
        let arithmetic = channels * largest(errors);
        Bounds { arithmetic, storage: arithmetic.max(largest(formats.map(rounding_error))) }
    }

    /// Compares rows `[query heads, head_dim]`; `bound` is that of a KV head.
    fn compare(
        &self,
        got: &[f32],
        expected: &Expected,
        bound: impl Fn(usize) -> f64,
        against: &str,
    ) {
        let shape = self.config.shape;
        assert_eq!(got.len(), expected.output.len());
        for (i, (&got, &want)) in got.iter().zip(&expected.output).enumerate() {
            if expected.stained && !want.is_finite() {
                let same = got.is_nan() && want.is_nan() || f64::from(got) == want;
                assert!(same, "element {i}: {got}, {against} says {want}");
                continue;
            }
            let bound = bound(i / shape.head_dim % shape.query_heads / shape.group());
            let error = (f64::from(got) - want).abs() / expected.largest;
            // Written so that NaN fails.
            assert!(
                error <= bound,
                "element {i}: {got}, {against} says {want} (error {error:.2e} > {bound:.0e})"
            );
        }
    }

    /// What the oracle says; on values as they are stored, or as they were given.
    fn oracle(
        &self,
        layer: Layer,
        name: usize,
        positions: std::ops::Range<usize>,
        stored: bool,
    ) -> Expected {
        let shape = self.config.shape;
        let packed = self.packed(name);
        let tokens = |kind: Kind, tensor: Tensor| -> Vec<f64> {
            let width = shape.kv_heads * shape.head_dim;
            let value = |i: usize| self.value(kind, name, [layer.0, i / width, i % width]);
            let mut values: Vec<f32> = (0..positions.end * width).map(value).collect();
            if stored {
                self.store(layer, tensor, (positions.start, packed), &mut values);
            }
            values.into_iter().map(f64::from).collect()
        };
        let q_width = shape.query_heads * shape.head_dim;
        let query = |i: usize| {
            let position = positions.start + i / q_width;
            f64::from(self.value(Kind::Query, name, [layer.0, position, i % q_width]))
        };
        let queries: Vec<f64> = (0..positions.len() * q_width).map(query).collect();
        let (keys, values) = (tokens(Kind::Key, Tensor::K), tokens(Kind::Value, Tensor::V));
        let attention = Attention {
            masks: self.config.mask.layer(layer),
            query_heads: shape.query_heads,
            windows: self.config.windows,
            block: self.config.block,
            scale: f64::from(self.config.scale()),
            soft_cap: self.config.soft_cap.map(f64::from),
            start: positions.start,
            keys: &keys,
            values: &values,
            queries: &queries,
        };
        let largest = values.iter().fold(0.0f64, |most, v| most.max(v.abs()));
        let output = attention.output_packed(packed);
        Expected { output, largest, stained: self.stain.is_some() }
    }

    /// Makes of K or V of a sequence, `[tokens, KV heads, head_dim]`, what the cache holds in a step
    /// whose first query stands at `start`; `packed` as in a [`History`].
    fn store(
        &self,
        layer: Layer,
        tensor: Tensor,
        (start, packed): (usize, usize),
        values: &mut [f32],
    ) {
        let CacheConfig { shape, block, windows, dtype, .. } = self.config;
        values.iter_mut().for_each(|x| *x = dtype.round(*x));
        let width = shape.kv_heads * shape.head_dim;
        let stays_lean = windows.sink.div_ceil(block)..packed;
        for (index, rows) in values.chunks_mut(block * width).enumerate() {
            if !(stays_lean.contains(&index) || is_lean(index, block, windows, start)) {
                continue;
            }
            for head in shape.kv_head_indices() {
                let part = head.0 * shape.head_dim..(head.0 + 1) * shape.head_dim;
                let mut own: Vec<f32> =
                    rows.chunks(width).flat_map(|row| &row[part.clone()]).copied().collect();
                let format = self.config.format(layer, head).of(tensor);
                round_trip(format, tensor, shape.head_dim, &mut own);
                let own = own.chunks(shape.head_dim);
                rows.chunks_mut(width).zip(own).for_each(|(row, own)| {
                    row[part.clone()].copy_from_slice(own);
                });
            }
        }
    }
}

/// Largest errors of a KV head's outputs, as shares of the largest |v|.
struct Bounds {
    /// Against the oracle on stored values.
    arithmetic: f64,
    /// Against the oracle on exact ones.
    storage: f64,
}

struct Expected {
    output: Vec<f64>,
    /// Largest |v|.
    largest: f64,
    /// Whether it may be NaN or infinite.
    stained: bool,
}
