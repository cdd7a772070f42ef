//! Made-up dumps for examples, tests and benches: no model, but its main traits. Channels differ
//! in how much they matter, keys cluster so that attention is neither flat nor one-hot, and a
//! first token draws attention as a sink does.

use std::path::Path;

use leank_core::{Dtype, Fingerprint, Layer, ModelShape};

use crate::{
    Result,
    dump::{Dump, DumpWriter, Manifest, Probe, SequenceInfo, SequenceTensors},
    rng::Rng,
};

/// What kind of dump to make up.
#[derive(Clone, Debug)]
pub struct Synthetic {
    /// Attention shape.
    pub shape: ModelShape,
    /// Prefix of each sequence, in tokens.
    pub prefixes: Vec<usize>,
    /// Decode positions per sequence.
    pub positions: usize,
    /// Draws of the probe.
    pub draws: usize,
    /// Element type.
    pub dtype: Dtype,
    /// Seed of everything.
    pub seed: u64,
}

impl Synthetic {
    /// The manifest of such a dump; every position valid.
    #[must_use]
    pub fn manifest(&self) -> Manifest {
        let sequence =
            |(i, &prefix)| SequenceInfo::new(prefix, self.positions, format!("synthetic {i}"));
        Manifest {
            version: crate::dump::FORMAT_VERSION,
            model_id: "synthetic".into(),
            fingerprint: Fingerprint {
                architecture: "synthetic".into(),
                shape: self.shape,
                rope_base: 1e4,
                rope_scaling: None,
                config_hash: format!("{:064x}", self.seed),
                sliding: None,
            },
            shape: self.shape,
            dtype: self.dtype,
            probe: Probe::Random,
            draws: self.draws,
            positions: self.positions,
            seed: self.seed,
            sequences: self.prefixes.iter().enumerate().map(sequence).collect(),
            run: None,
        }
    }

    /// Writes the dump to `dir` and opens it.
    ///
    /// # Errors
    /// As [`DumpWriter`] and [`Dump::open`].
    pub fn write(&self, dir: &Path) -> Result<Dump> {
        self.write_as(dir, self.manifest())
    }

    /// As [`Synthetic::write`] with a manifest of one's own, of the same sizes.
    ///
    /// # Errors
    /// As [`Synthetic::write`].
    pub fn write_as(&self, dir: &Path, manifest: Manifest) -> Result<Dump> {
        let mut writer = DumpWriter::create(dir, manifest)?;
        for layer in self.shape.layer_indices() {
            for sequence in 0..self.prefixes.len() {
                let own = self.sequence(layer, sequence);
                let [q, k, v, g] = [&own.q, &own.k, &own.v, &own.g];
                writer.write(layer, sequence, SequenceTensors { q, k, v, g })?;
            }
        }
        writer.finish()?;
        Dump::open(dir)
    }

    /// The activations of one sequence in one layer, before conversion to the dump's dtype.
    #[must_use]
    pub fn sequence(&self, layer: Layer, sequence: usize) -> OwnedTensors {
        let shape = &self.shape;
        let (d, n) = (shape.head_dim, self.positions);
        let tokens = self.prefixes[sequence] + n;
        // Weights of the channels: the same in every sequence, other ones in every KV head.
        let weight = |kv_head: usize| {
            let mut rng = Rng::fork(self.seed, 1 + (layer.0 * shape.kv_heads + kv_head) as u64);
            (0..d).map(|_| 3.0 * rng.uniform().powi(3) as f32).collect::<Vec<_>>()
        };
        let weights: Vec<_> = (0..shape.kv_heads).map(weight).collect();
        let stream = (1 << 40) + ((layer.0 as u64) << 20) + sequence as u64;
        let mut rng = Rng::fork(self.seed, stream);
        let flat = vec![1.0; d];
        let mut rows = |heads: usize, rows: usize, group: Option<usize>, bias: f32| {
            let mut values = Vec::with_capacity(heads * rows * d);
            for head in 0..heads {
                let own = group.map_or(&flat, |group| &weights[head / group]);
                for row in 0..rows {
                    let sink = if row == 0 { 2.0 } else { 1.0 };
                    values.extend(
                        own.iter().map(|scale| scale * sink * (rng.normal() as f32 + bias)),
                    );
                }
            }
            values
        };
        let q = rows(shape.query_heads, n, Some(shape.group()), 0.5);
        let k = rows(shape.kv_heads, tokens, Some(1), 0.2);
        let v = rows(shape.kv_heads, tokens, None, 0.0);
        let mut g = rows(self.draws * shape.query_heads, n, None, 0.0);
        g.iter_mut().for_each(|g| *g *= 0.05);
        OwnedTensors { q, k, v, g }
    }
}

/// Owned activations of one sequence in one layer; shapes as in
/// [`SequenceTensors`].
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct OwnedTensors {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub g: Vec<f32>,
}
