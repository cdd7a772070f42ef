//! What learning leaves on disk per layer, so that a killed run loses no finished layer and a
//! second budget recomputes nothing.
//!
//! A record is one JSON file per layer, `layer-000.json`, written beside its place and renamed, in
//! a directory named after everything its content depends on. In its front stands a checksum, `sum`: the
//! CRC-32 (zlib's) of the bytes behind it, in eight hexadecimal digits. A record of an older leank has
//! none, and is read all the same. Layers are independent: shards
//! that learn different layers fill one directory together, or directories of their own that
//! [`merge`](crate::merge::merge) joins. What a killed run was just writing is removed by the next one.

use std::{
    fs, io,
    ops::Range,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use leank_core::{
    KvHead, Layer,
    files::{read_regular, remove_leftovers, write_atomic},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    Error, Result,
    dump::{Dump, LayerDump},
};

/// What happened in a learning run, for a progress display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// What is being computed, for people.
    pub phase: &'a str,
    /// KV heads done in this phase, those read from records included.
    pub done: usize,
    /// KV heads of the phase.
    pub total: usize,
    /// Of those done, how many were read from records.
    pub reused: usize,
}

/// Hears of progress, from any thread.
pub type OnProgress<'a> = &'a (dyn Fn(Progress<'_>) + Sync);

/// What one phase of learning finds for a KV head.
pub(crate) trait HeadResult: Serialize + DeserializeOwned + Send {
    /// Version of its records: another one where what they hold or how it is measured changes.
    const VERSION: u32 = 1;

    /// Checks one that was read from disk.
    ///
    /// # Errors
    /// What is wrong with it.
    fn check(&self, head_dim: usize) -> Result<(), String>;
}

impl HeadResult for crate::order::HeadCurve {
    fn check(&self, head_dim: usize) -> Result<(), String> {
        self.check(head_dim)
    }
}

impl HeadResult for crate::order::PrecisionCurve {
    fn check(&self, head_dim: usize) -> Result<(), String> {
        self.check(head_dim)
    }
}

/// Name of a layer's record in its directory.
pub(crate) fn record_name(layer: Layer) -> String {
    format!("layer-{:03}.json", layer.0)
}

/// Largest record that is read; one of the largest models takes some megabytes.
pub(crate) const MAX_BYTES: u64 = 64 << 20;

/// What a record with a checksum begins with; its digits and `",` follow.
const FRONT: &[u8] = b"{\"sum\":\"";
const DIGITS: usize = 8;

/// A record from its bytes.
///
/// # Errors
/// Why they are none, or not those that were written.
pub(crate) fn from_bytes<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    #[derive(Deserialize)]
    struct Sum {
        sum: Option<String>,
    }
    let Sum { sum } = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    if let Some(expected) = sum {
        let behind = json.strip_prefix(FRONT).and_then(|rest| rest.get(DIGITS..));
        let found = behind.map(|rest| format!("{:08x}", crc32fast::hash(rest)));
        if found.as_ref() != Some(&expected) {
            let found = found.as_deref().unwrap_or("not in its front");
            return Err(format!("its checksum is {found} where {expected} is expected"));
        }
    }
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

/// Puts the checksum into the front of a JSON object that has fields.
fn with_sum(json: &[u8]) -> Vec<u8> {
    let behind = [b"\",", &json[1..]].concat();
    let sum = format!("{:08x}", crc32fast::hash(&behind));
    [FRONT, sum.as_bytes(), &behind].concat()
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record<T> {
    /// Written by [`with_sum`], checked by [`from_bytes`].
    #[serde(default, rename = "sum", skip_serializing)]
    _sum: Option<String>,
    version: u32,
    /// Id of the dump.
    dump: String,
    layer: usize,
    heads: Vec<T>,
}

/// One phase of learning over all heads of a dump.
pub(crate) struct Phase<'a> {
    pub(crate) dump: &'a Dump,
    /// Name for progress.
    pub(crate) name: &'static str,
    /// Directory of the phase's records.
    pub(crate) directory: PathBuf,
    /// Layers that the phase is run for.
    pub(crate) layers: Range<usize>,
    pub(crate) pool: &'a rayon::ThreadPool,
    pub(crate) progress: OnProgress<'a>,
}

/// What the workers of a phase share.
struct Shared<'a, T> {
    /// Heads still to do, in order of layers.
    tasks: Vec<(Layer, KvHead)>,
    next: AtomicUsize,
    failed: AtomicBool,
    state: Mutex<State<T>>,
    phase: &'a Phase<'a>,
    reused: usize,
}

struct State<T> {
    /// Per layer of the run and head.
    found: Vec<Vec<Option<T>>>,
    done: usize,
    /// The error of the first head, in order, that failed.
    error: Option<((Layer, KvHead), Error)>,
}

impl Phase<'_> {
    /// Runs `task` on every head of the phase's layers that no record covers; all results, by layer of
    /// the phase and head.
    ///
    /// Heads are taken in order by whichever thread is free, so that a killed run leaves whole
    /// layers. Results do not depend on the number of threads, since a task does not.
    ///
    /// # Errors
    /// The first error of a task in order of heads among those that ran; [`Error::Record`];
    /// [`Error::Io`] and [`Error::Core`] from the files.
    pub(crate) fn run<T: HeadResult>(
        &self,
        task: impl Fn(&LayerDump<'_>, KvHead) -> Result<T> + Sync,
    ) -> Result<Vec<Vec<T>>> {
        let shape = self.dump.manifest().shape;
        fs::create_dir_all(&self.directory)
            .map_err(Error::io(&self.directory, "creating the directory"))?;
        remove_leftovers(&self.directory);
        let mut found = Vec::with_capacity(self.layers.len());
        let mut tasks = Vec::new();
        for layer in self.layers.clone().map(Layer) {
            match self.read(layer)? {
                Some(heads) => found.push(heads.into_iter().map(Some).collect()),
                None => {
                    found.push((0..shape.kv_heads).map(|_| None).collect::<Vec<_>>());
                    tasks.extend(shape.kv_head_indices().map(|head| (layer, head)));
                }
            }
        }
        let reused = self.layers.len() * shape.kv_heads - tasks.len();
        let shared = Shared {
            tasks,
            next: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
            state: Mutex::new(State { found, done: reused, error: None }),
            phase: self,
            reused,
        };
        shared.report(reused);
        self.pool.broadcast(|_| shared.work(&task));
        let state = shared.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        match state.error {
            Some((_, error)) => Err(error),
            None => {
                Ok(state.found.into_iter().map(|own| own.into_iter().flatten().collect()).collect())
            }
        }
    }

    /// What is recorded, by layer and head; `None` where a layer's record is missing.
    ///
    /// # Errors
    /// [`Error::Record`]; [`Error::Io`].
    pub(crate) fn recorded<T: HeadResult>(&self) -> Result<Option<Vec<Vec<T>>>> {
        self.layers.clone().map(|layer| self.read(Layer(layer))).collect()
    }

    fn path(&self, layer: Layer) -> PathBuf {
        self.directory.join(record_name(layer))
    }

    /// The record of a layer, where there is one.
    fn read<T: HeadResult>(&self, layer: Layer) -> Result<Option<Vec<T>>> {
        let path = self.path(layer);
        let json = match read_regular(&path, MAX_BYTES) {
            Ok(json) => json,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io(&path, "reading")(error)),
        };
        let shape = self.dump.manifest().shape;
        let check = || -> Result<Vec<T>, String> {
            let record: Record<T> = from_bytes(&json)?;
            let differs = |what, found: &dyn ToString, expected: &dyn ToString| {
                let (found, expected) = (found.to_string(), expected.to_string());
                if found == expected {
                    return Ok(());
                }
                Err(format!("{what} is {found} where {expected} is expected"))
            };
            differs("its version", &record.version, &T::VERSION)?;
            differs("its dump", &record.dump, &self.dump.id())?;
            differs("its layer", &record.layer, &layer)?;
            differs("its number of heads", &record.heads.len(), &shape.kv_heads)?;
            record.heads.iter().try_for_each(|head| head.check(shape.head_dim))?;
            Ok(record.heads)
        };
        check().map(Some).map_err(|why| Error::Record { path: path.clone(), why })
    }

    /// Writes the record of a layer: whole or not at all.
    fn write<T: HeadResult>(&self, layer: Layer, heads: Vec<T>) -> Result<Vec<T>> {
        let path = self.path(layer);
        let dump = self.dump.id().to_owned();
        let record = Record { _sum: None, version: T::VERSION, dump, layer: layer.0, heads };
        let broken =
            |e: serde_json::Error| Error::Record { path: path.clone(), why: e.to_string() };
        let json = serde_json::to_vec(&record).map_err(broken)?;
        write_atomic(&path, &with_sum(&json))?;
        Ok(record.heads)
    }
}

impl<T: HeadResult> Shared<'_, T> {
    fn report(&self, done: usize) {
        let total = self.reused + self.tasks.len();
        (self.phase.progress)(Progress {
            phase: self.phase.name,
            done,
            total,
            reused: self.reused,
        });
    }

    /// Takes heads until none is left or one failed.
    fn work(&self, task: impl Fn(&LayerDump<'_>, KvHead) -> Result<T>) {
        while !self.failed.load(Ordering::Relaxed) {
            let at = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(&(layer, head)) = self.tasks.get(at) else { return };
            let result = self.phase.dump.layer(layer).and_then(|own| task(&own, head));
            if let Err(error) = result.and_then(|found| self.finished(layer, head, found)) {
                self.failed.store(true, Ordering::Relaxed);
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.error.as_ref().is_none_or(|(first, _)| (layer, head) < *first) {
                    state.error = Some(((layer, head), error));
                }
            }
        }
    }

    /// Keeps a result, and writes the layer's record when it was the last one missing.
    fn finished(&self, layer: Layer, head: KvHead, found: T) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let of_layer = &mut state.found[layer.0 - self.phase.layers.start];
        of_layer[head.0] = Some(found);
        if of_layer.iter().all(Option::is_some) {
            let heads = self.phase.write(layer, of_layer.drain(..).flatten().collect())?;
            *of_layer = heads.into_iter().map(Some).collect();
        }
        state.done += 1;
        let done = state.done;
        drop(state);
        self.report(done);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Vec<u8> {
        let dump = "0".repeat(64);
        serde_json::to_vec(&Record {
            _sum: None,
            version: 1,
            dump,
            layer: 3,
            heads: vec![0.5, 1.0],
        })
        .unwrap()
    }

    #[test]
    fn any_flipped_bit_of_a_record_is_noticed() {
        let sound = with_sum(&record());
        let read = from_bytes::<Record<f64>>;
        assert_eq!(read(&sound).unwrap().heads, [0.5, 1.0]);
        for bit in 0..8 * sound.len() {
            let mut bent = sound.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&bent).is_err(), "{}", String::from_utf8_lossy(&bent));
        }
    }

    #[test]
    fn a_record_without_checksum_is_read_and_a_moved_checksum_is_not() {
        let read = from_bytes::<Record<f64>>;
        assert_eq!(read(&record()).unwrap().layer, 3);
        let why = read(&[b" ", &with_sum(&record())[..]].concat()).err().unwrap();
        assert!(why.contains("not in its front"), "{why}");
    }
}
