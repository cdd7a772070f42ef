//! What a dump says about itself, validated before anything else is read.

use std::{fmt, path::Path, str::FromStr};

use leank_core::{Dtype, Fingerprint, ModelShape, RunRecord, Windows};
use serde::{Deserialize, Serialize};

use super::layout::{MAX_HEADER, needed_header};
use crate::{Error, Result};

/// Version of the dump format that this build writes and reads.
pub const FORMAT_VERSION: u32 = 1;

// Limits far above any real dump; they keep all later arithmetic far from overflow.

/// Most sequences of a dump.
pub const MAX_SEQUENCES: usize = 1 << 20;
/// Most decode positions per sequence.
pub const MAX_POSITIONS: usize = 1 << 20;
/// Longest prefix of a sequence, in tokens.
pub const MAX_PREFIX: usize = 1 << 28;
/// Most draws of the probe.
pub const MAX_DRAWS: usize = 1 << 10;

/// How the probe `g` was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Probe {
    /// Gradient of the log-likelihood of tokens sampled from the model's own softmax: half the
    /// mean of `s²` is then a KL divergence in nats.
    #[default]
    Fisher,
    /// Normal noise over the root mean square of the attention output, per layer: no backward
    /// pass, and losses have no unit.
    Random,
}

impl Probe {
    /// Every probe.
    pub const ALL: [Self; 2] = [Self::Fisher, Self::Random];
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fisher => "fisher",
            Self::Random => "random",
        })
    }
}

impl FromStr for Probe {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|probe| probe.to_string() == name).ok_or_else(|| {
            Error::options("probe", format!("{name:?} is none of fisher and random"))
        })
    }
}

/// One sequence of a dump.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SequenceInfo {
    /// Tokens before the first decode position.
    pub prefix: usize,
    /// Decode positions that count, strictly ascending, each below the manifest's `positions`.
    pub valid: Vec<u32>,
    /// Where the text came from, for people; it also tells dumps of different texts apart.
    pub source: String,
}

impl SequenceInfo {
    /// A sequence whose `positions` decode positions all count.
    #[must_use]
    pub fn new(prefix: usize, positions: usize, source: impl Into<String>) -> Self {
        let valid = (0..positions).filter_map(|p| u32::try_from(p).ok()).collect();
        Self { prefix, valid, source: source.into() }
    }
}

/// What a dump holds and how it was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the format: [`FORMAT_VERSION`].
    pub version: u32,
    /// Name of the model, for people.
    pub model_id: String,
    /// Identity of the model.
    pub fingerprint: Fingerprint,
    /// Attention shape of the model; equals the fingerprint's.
    pub shape: ModelShape,
    /// Element type of all tensors.
    pub dtype: Dtype,
    /// How `g` was made.
    pub probe: Probe,
    /// Draws of the probe, `R`.
    pub draws: usize,
    /// Decode positions per sequence, `N`.
    pub positions: usize,
    /// Seed of the sampling.
    pub seed: u64,
    /// The sequences, in the order of their tensors.
    pub sequences: Vec<SequenceInfo>,
    /// The run that made the dump, where its writer says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunRecord>,
}

/// Only the version, so that a newer manifest is told from a broken one.
#[derive(Deserialize)]
struct VersionOnly {
    version: u64,
}

impl Manifest {
    /// Whether a dump with the manifest `other` would hold the same: all but the words of the command
    /// is equal.
    #[must_use]
    pub fn is_same_work(&self, other: &Self) -> bool {
        let work = |own: &Self| {
            let mut own = own.clone();
            own.run.iter_mut().for_each(|run| run.command.clear());
            own
        };
        work(self) == work(other)
    }

    /// Tokens of sequence `i` that have keys and values: its prefix and its positions.
    ///
    /// # Panics
    /// When there is no such sequence.
    #[must_use]
    pub fn tokens(&self, sequence: usize) -> usize {
        self.sequences[sequence].prefix + self.positions
    }

    /// Decode positions that count, over all sequences.
    #[must_use]
    pub fn valid_positions(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.valid.len()).sum()
    }

    /// Of the valid positions, how many see a token between sink and recent window. Only these
    /// say what a mask costs; the others lose nothing whatever is pruned.
    #[must_use]
    pub fn positions_with_middle(&self, windows: Windows) -> usize {
        let whole = windows.sink.saturating_add(windows.recent.max(1));
        let sees_middle = |prefix: usize, position: u32| prefix + position as usize + 1 > whole;
        let count = |own: &SequenceInfo| {
            own.valid.iter().filter(|&&position| sees_middle(own.prefix, position)).count()
        };
        self.sequences.iter().map(count).sum()
    }

    /// Checks every number of the manifest; `path` is named in the error.
    ///
    /// # Errors
    /// [`Error::Version`], [`Error::Manifest`].
    pub fn validate(&self, path: &Path) -> Result<()> {
        let fail = |why: String| Err(Error::Manifest { path: path.to_owned(), why });
        if self.version != FORMAT_VERSION {
            return Err(Error::Version {
                path: path.to_owned(),
                found: self.version.into(),
                supported: FORMAT_VERSION,
            });
        }
        if let Err(error) = self.shape.validate() {
            return fail(error.to_string());
        }
        if self.fingerprint.shape != self.shape {
            let own = self.fingerprint.shape;
            return fail(format!("the fingerprint says {own}, the manifest {}", self.shape));
        }
        for (what, n, max) in [
            ("draws", self.draws, MAX_DRAWS),
            ("positions", self.positions, MAX_POSITIONS),
            ("number of sequences", self.sequences.len(), MAX_SEQUENCES),
        ] {
            if n == 0 || n > max {
                return fail(format!("{what} is {n}, not in 1..={max}"));
            }
        }
        // Each number may be possible, and the description of so many tensors not.
        let header = needed_header(self);
        if header > MAX_HEADER {
            return fail(format!(
                "the header of a layer's file would take {header} bytes, and a safetensors header has \
                 {MAX_HEADER} at most; dump fewer sequences or draws"
            ));
        }
        for (i, sequence) in self.sequences.iter().enumerate() {
            if let Err(why) = self.validate_sequence(sequence) {
                return fail(format!("sequence {i}: {why}"));
            }
        }
        if self.valid_positions() == 0 {
            return fail("no position is valid; at least one must count".into());
        }
        Ok(())
    }

    fn validate_sequence(&self, sequence: &SequenceInfo) -> Result<(), String> {
        if sequence.prefix > MAX_PREFIX {
            return Err(format!("a prefix of {} tokens is above {MAX_PREFIX}", sequence.prefix));
        }
        if let Some(pair) = sequence.valid.windows(2).find(|pair| pair[0] >= pair[1]) {
            let (a, b) = (pair[0], pair[1]);
            return Err(format!("valid positions must ascend strictly: {a} comes before {b}"));
        }
        match sequence.valid.last() {
            Some(&last) if last as usize >= self.positions => {
                Err(format!("valid position {last} is not below positions = {}", self.positions))
            }
            _ => Ok(()),
        }
    }

    /// A manifest from the bytes of its file, validated.
    ///
    /// # Errors
    /// As [`Manifest::validate`]; [`Error::Manifest`] for bytes that are not such JSON.
    pub fn from_json(json: &[u8], path: &Path) -> Result<Self> {
        let broken = |error: serde_json::Error| Error::Manifest {
            path: path.to_owned(),
            why: format!("{error}; dump again"),
        };
        let VersionOnly { version } = serde_json::from_slice(json).map_err(broken)?;
        if version != u64::from(FORMAT_VERSION) {
            return Err(Error::Version {
                path: path.to_owned(),
                found: version,
                supported: FORMAT_VERSION,
            });
        }
        let manifest: Self = serde_json::from_slice(json).map_err(broken)?;
        manifest.validate(path)?;
        Ok(manifest)
    }

    /// The bytes of the manifest's file.
    ///
    /// # Errors
    /// [`Error::Manifest`] when it cannot be written as JSON (a RoPE base that is not finite).
    pub fn to_json(&self, path: &Path) -> Result<Vec<u8>> {
        let mut json = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::Manifest { path: path.to_owned(), why: e.to_string() })?;
        json.push(b'\n');
        Ok(json)
    }
}
