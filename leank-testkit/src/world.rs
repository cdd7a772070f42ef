//! A cache under test together with what is known about it.

use std::collections::HashMap;

use leank_core::{
    Backend, Cache, CacheConfig, Dtype, KvHead, Layer, LeanFormat, Result, SequenceId, StepEntry,
    blocks::is_lean, oracle::Attention,
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
    seed: u64,
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
        let cache = subject.backend().create(config.clone()).expect("the case is valid");
        let (sequences, histories) = (Vec::new(), HashMap::new());
        let mut world = Self { subject, config, cache, sequences, histories, seed: case.seed };
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
        activation(self.seed, kind, [name, layer, position, element])
    }

    /// The index before which blocks are lean whatever the windows say.
    pub(crate) fn packed(&self, name: usize) -> usize {
        self.histories.get(&name).map_or(0, |history| history.packed)
    }

    /// Plans the step and appends to and attends from every layer, without committing.
    pub(crate) fn begin(&mut self, loads: &[Load]) -> Result<Outputs> {
        self.cache.plan(&self.entries(loads))?;
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
    pub(crate) fn checked_step(&mut self, loads: &[Load]) {
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
        // Errors of a logit add up over the channels.
        let channels = (self.config.shape.head_dim as f64 / 128.0).max(1.0);
        let arithmetic =
            channels * self.largest(layer, |dtype| self.subject.arithmetic_error(dtype));
        let stored = self.oracle(layer, name, positions.clone(), true);
        compare(&got, &stored, arithmetic, "the oracle on stored values");
        let bound = arithmetic.max(self.largest(layer, rounding_error));
        let exact = self.oracle(layer, name, positions, false);
        compare(&got, &exact, bound, "the oracle on exact values");
    }

    /// The largest bound among the types in which the layer is stored.
    fn largest(&self, layer: Layer, bound: impl Fn(Dtype) -> f64) -> f64 {
        let plain = |format| match format {
            LeanFormat::Plain(dtype) => bound(dtype),
            _ => panic!("no bound is stated for {format}"),
        };
        let heads = self.config.shape.kv_head_indices();
        let formats = heads.map(|head| self.config.format(layer, head));
        formats.fold(bound(self.config.dtype), |most, format| {
            most.max(plain(format.k)).max(plain(format.v))
        })
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
        let width = shape.kv_heads * shape.head_dim;
        let (block, windows, packed) = (self.config.block, self.config.windows, self.packed(name));
        let is_lean = |position: usize| {
            let stays = (windows.sink.div_ceil(block)..packed).contains(&(position / block));
            stays || is_lean(position / block, block, windows, positions.start)
        };
        let tokens = |kind: Kind| -> Vec<f64> {
            let value = |i: usize| {
                let (position, element) = (i / width, i % width);
                let x = self.value(kind, name, [layer.0, position, element]);
                if !stored {
                    return f64::from(x);
                }
                let head = KvHead(element / shape.head_dim);
                f64::from(self.store(kind, layer, head, is_lean(position), x))
            };
            (0..positions.end * width).map(value).collect()
        };
        let q_width = shape.query_heads * shape.head_dim;
        let query = |i: usize| {
            let position = positions.start + i / q_width;
            f64::from(self.value(Kind::Query, name, [layer.0, position, i % q_width]))
        };
        let queries: Vec<f64> = (0..positions.len() * q_width).map(query).collect();
        let (keys, values) = (tokens(Kind::Key), tokens(Kind::Value));
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
        Expected { output: attention.output_packed(packed), largest }
    }

    /// `x` as the cache holds it, in a full block or a lean one.
    fn store(&self, kind: Kind, layer: Layer, head: KvHead, lean: bool, x: f32) -> f32 {
        let x = self.config.dtype.round(x);
        if !lean {
            return x;
        }
        let format = self.config.format(layer, head);
        match if kind == Kind::Key { format.k } else { format.v } {
            LeanFormat::Plain(dtype) => dtype.round(x),
            other => panic!("the suite does not know {other} yet"),
        }
    }
}

struct Expected {
    output: Vec<f64>,
    /// Largest |v|.
    largest: f64,
}

fn compare(got: &[f32], expected: &Expected, bound: f64, against: &str) {
    assert_eq!(got.len(), expected.output.len());
    for (i, (&got, &want)) in got.iter().zip(&expected.output).enumerate() {
        let error = (f64::from(got) - want).abs() / expected.largest;
        // Written so that NaN fails.
        assert!(
            error <= bound,
            "element {i}: {got}, {against} says {want} (error {error:.2e} > {bound:.0e})"
        );
    }
}
