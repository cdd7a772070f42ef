//! Dumps activations of a model on texts, for `leank-train` to learn masks from.

use std::ops::RangeInclusive;
use std::path::Path;

use leank_core::{Dtype, Layer, RunRecord};
use leank_train::dump::{
    DumpWriter, Existing, FORMAT_VERSION, MAX_DRAWS, MAX_POSITIONS, MAX_SEQUENCES, Manifest, Probe,
    SequenceInfo, SequenceTensors,
};
use leank_train::rng::Rng;

use crate::cuts::{Cut, cut, spread_prefixes};
use crate::model::Model;
use crate::probe::{ProbeOptions, SequenceProbe, probe};
use crate::texts::{Sequence, Text, piece, tokenize};
use crate::{Error, Result, retrieval};

/// What to dump.
#[derive(Clone, Debug)]
pub struct DumpOptions {
    /// Sequences.
    pub sequences: usize,
    /// Decode positions per sequence.
    pub positions: usize,
    /// Prefix lengths in tokens, spread evenly over the sequences.
    pub prefix: RangeInclusive<usize>,
    /// The kind of probe.
    pub probe: Probe,
    /// Draws of the probe.
    pub draws: usize,
    /// Element type on disk.
    pub dtype: Dtype,
    /// Seed of everything random.
    pub seed: u64,
    /// Share of the sequences that are retrieval tasks hidden in text, 0 to 1.
    pub retrieval: f64,
    /// What to do with a dump that is there already.
    pub existing: Existing,
    /// The run that this is, for the dump to tell: see [`Manifest::run`].
    pub run: Option<RunRecord>,
}

impl Default for DumpOptions {
    fn default() -> Self {
        Self {
            sequences: 48,
            positions: 128,
            prefix: 1024..=3584,
            probe: Probe::Fisher,
            draws: 2,
            dtype: Dtype::F16,
            seed: 0,
            retrieval: 0.3,
            existing: Existing::default(),
            run: None,
        }
    }
}

/// How far a dump is, after each sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DumpProgress {
    /// Sequences written.
    pub done: usize,
    /// Of those, how many a killed run had written.
    pub resumed: usize,
    /// Sequences in all.
    pub sequences: usize,
    /// Bytes of the whole dump.
    pub bytes: u64,
}

/// Runs `model` over pieces of `texts` and writes the dump to `dir`, which appears when it is whole. It
/// holds the global layers ([`ModelConfig::global_layers`](crate::ModelConfig::global_layers)).
/// Sequences that a killed run of the same dump has written are not computed again.
///
/// # Errors
/// Before anything runs, [`Error::Option`] for options that cannot be, [`Error::Context`],
/// [`Error::EmptyText`], [`Error::ShortText`] and what [`DumpWriter::check_target`] says of `dir`;
/// then what [`probe`](crate::probe()) and the [`DumpWriter`] return. Nothing is left at `dir` after an error.
pub fn dump(
    model: &Model,
    texts: &[Text],
    dir: &Path,
    options: &DumpOptions,
    progress: &mut dyn FnMut(DumpProgress),
) -> Result<Manifest> {
    check(model, options)?;
    DumpWriter::check_target(dir, options.existing)?;
    let plans = plan(model, texts, options)?;
    let info =
        |own: &Sequence| SequenceInfo::new(own.prefix, options.positions, own.source.clone());
    let sequences = plans.iter().map(info).collect();
    let manifest = Manifest {
        version: FORMAT_VERSION,
        model_id: model.config().name.clone(),
        fingerprint: model.fingerprint().clone(),
        shape: model.config().global_shape()?,
        dtype: options.dtype,
        probe: options.probe,
        draws: options.draws,
        positions: options.positions,
        seed: options.seed,
        sequences,
        run: options.run.clone(),
    };
    let mut writer = DumpWriter::create_with(dir, manifest, options.existing)?;
    let shape = writer.manifest().shape;
    let is_whole = |writer: &DumpWriter, index| {
        shape.layer_indices().all(|layer| writer.is_written(layer, index))
    };
    let whole: Vec<bool> = (0..plans.len()).map(|index| is_whole(&writer, index)).collect();
    let resumed = whole.iter().filter(|whole| **whole).count();
    let mut done = resumed;
    let mut report = |done, bytes| {
        progress(DumpProgress { done, resumed, sequences: plans.len(), bytes });
    };
    report(done, writer.total_bytes());
    for (index, plan) in plans.iter().enumerate().filter(|(index, _)| !whole[*index]) {
        let probe_options = ProbeOptions {
            prefix: plan.prefix,
            probe: options.probe,
            draws: options.draws,
            seed: Rng::fork(options.seed, 2 * index as u64 + 1).next_u64(),
        };
        let probed = probe(model, &plan.tokens, &probe_options)?;
        write(&mut writer, index, &probed)?;
        done += 1;
        report(done, writer.total_bytes());
    }
    let manifest = writer.manifest().clone();
    writer.finish()?;
    Ok(manifest)
}

fn write(writer: &mut DumpWriter, sequence: usize, probed: &SequenceProbe) -> Result<()> {
    for (index, layer) in probed.layers.iter().enumerate() {
        // A killed run may have written some layers of a sequence.
        if !writer.is_written(Layer(index), sequence) {
            let tensors = SequenceTensors { q: &layer.q, k: &layer.k, v: &layer.v, g: &layer.g };
            writer.write(Layer(index), sequence, tensors)?;
        }
    }
    Ok(())
}

fn check(model: &Model, options: &DumpOptions) -> Result<()> {
    let (shortest, longest) = (*options.prefix.start(), *options.prefix.end());
    for (option, n, most) in [
        ("sequences", options.sequences, MAX_SEQUENCES),
        ("positions", options.positions, MAX_POSITIONS),
        ("draws", options.draws, MAX_DRAWS),
    ] {
        if n == 0 {
            return Err(Error::option(option, "0 leaves nothing to dump; take at least 1"));
        }
        if n > most {
            return Err(Error::option(option, format!("{n} are more than a dump holds, {most}")));
        }
    }
    if shortest == 0 || shortest > longest {
        let why =
            format!("{shortest}..{longest} is not a range of at least one token, shortest first");
        return Err(Error::option("prefix", why));
    }
    if !(0.0..=1.0).contains(&options.retrieval) {
        let why = format!("{} is not a share between 0 and 1", options.retrieval);
        return Err(Error::option("retrieval", why));
    }
    model.config().global_shape()?;
    let needed = longest.saturating_add(options.positions);
    let limit = model.config().context_length;
    if needed > limit {
        return Err(Error::Context { what: "the longest prefix + positions", needed, limit });
    }
    Ok(())
}

/// The sequences that [`dump()`] would run the model over, e.g. to run another program's model over
/// them. Of the options it looks at those that say which tokens, and at the seed.
///
/// # Errors
/// Those of [`dump()`] that come before anything runs, but for the target's.
pub fn sequences(model: &Model, texts: &[Text], options: &DumpOptions) -> Result<Vec<Sequence>> {
    check(model, options)?;
    plan(model, texts, options)
}

fn plan(model: &Model, texts: &[Text], options: &DumpOptions) -> Result<Vec<Sequence>> {
    let (shortest, longest) = (*options.prefix.start(), *options.prefix.end());
    let positions = options.positions;
    let why = format!("prefix {longest} + positions {positions}");
    let tokens = tokenize(model, texts, longest + positions, &why)?;
    let mut rng = Rng::fork(options.seed, 0);
    let prefixes = spread_prefixes(options.sequences, (shortest, longest), &mut rng);
    let mut order: Vec<usize> = (0..options.sequences).collect();
    rng.shuffle(&mut order);
    let tasks = (options.retrieval * options.sequences as f64).round() as usize;
    let mut is_task = vec![false; options.sequences];
    order[..tasks].iter().for_each(|&i| is_task[i] = true);
    let lengths: Vec<usize> = prefixes.iter().map(|prefix| prefix + positions).collect();
    let text_lengths: Vec<usize> = tokens.iter().map(Vec::len).collect();
    let cuts = cut(&lengths, &text_lengths, &mut rng);
    let sequence = |(i, Cut { text, tokens: range }): (usize, Cut)| {
        let piece = piece(model, &tokens[text][range.clone()]);
        let place = format!("{} tokens {}..{}", texts[text].name, range.start, range.end);
        let prefix = prefixes[i];
        if !is_task[i] {
            return Ok(Sequence { tokens: piece, prefix, source: place });
        }
        let mut rng = Rng::fork(options.seed, 2 * i as u64 + 2);
        let task = retrieval::embed(model.tokenizer(), &piece, prefix, &mut rng)?;
        Ok(Sequence { tokens: task.tokens, prefix, source: format!("{} in {place}", task.name) })
    };
    cuts.into_iter().enumerate().map(sequence).collect()
}

#[cfg(test)]
mod tests {
    use leank_core::KvHead;
    use leank_train::dump::{Dump, HeadData};

    use super::*;
    use crate::testing::TinyModel;

    fn text(n: usize) -> Text {
        let mut rng = Rng::new(4);
        let text = (0..n).map(|_| char::from(b'a' + rng.below(26) as u8)).collect();
        Text { name: "letters".into(), text }
    }

    fn options() -> DumpOptions {
        DumpOptions {
            sequences: 4,
            positions: 8,
            prefix: 250..=280,
            dtype: Dtype::F32,
            retrieval: 0.5,
            ..DumpOptions::default()
        }
    }

    #[test]
    fn a_dump_holds_what_the_probe_saw() {
        let model = TinyModel::llama().load();
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("dump");
        let texts = [text(900), text(1500)];
        let mut calls = Vec::new();
        let manifest = dump(&model, &texts, &dir, &options(), &mut |p| calls.push(p.done)).unwrap();
        assert_eq!(calls, [0, 1, 2, 3, 4]);
        let tasks = manifest.sequences.iter().filter(|s| s.source.contains(" in letters")).count();
        assert_eq!(tasks, 2);

        let read = Dump::open(&dir).unwrap();
        assert_eq!(read.manifest(), &manifest);
        let plans = plan(&model, &texts, &options()).unwrap();
        let probe_options = ProbeOptions {
            prefix: plans[3].prefix,
            probe: Probe::Fisher,
            draws: 2,
            seed: Rng::fork(0, 7).next_u64(),
        };
        let probed = probe(&model, &plans[3].tokens, &probe_options).unwrap();
        let mut data = HeadData::default();
        read.layer(Layer(1)).unwrap().read(KvHead(1), 3, &mut data).unwrap();
        let layer = &probed.layers[1];
        assert_eq!(data.k, layer.k[layer.k.len() / 2..]);
        assert_eq!(data.v, layer.v[layer.v.len() / 2..]);
        assert_eq!(data.q, layer.q[layer.q.len() / 2..]);
        assert_eq!(data.g[..data.q.len()], layer.g[layer.q.len() / 2..layer.q.len()]);
    }

    #[test]
    fn a_dump_of_a_sliding_model_holds_its_global_layers() {
        let model = TinyModel::gemma3().load();
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("dump");
        let manifest = dump(&model, &[text(2000)], &dir, &options(), &mut |_| {}).unwrap();
        assert_eq!(manifest.shape, model.config().global_shape().unwrap());
        assert_eq!(manifest.shape.layers, 1);
        let read = Dump::open(&dir).unwrap();
        assert_eq!(read.manifest().fingerprint, *model.fingerprint());
        assert!(read.manifest().fingerprint.sliding.is_some());
        // Layer 0 of the dump is layer 1 of the model.
        let plans = plan(&model, &[text(2000)], &options()).unwrap();
        let mut dense = crate::DenseAttention::new(model.config(), 0);
        dense.prefill(&model, &plans[0].tokens).unwrap();
        let keys: Vec<f32> = dense.keys(1).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let mut data = HeadData::default();
        read.layer(Layer(0)).unwrap().read(KvHead(0), 0, &mut data).unwrap();
        for (got, want) in data.k.iter().zip(&keys) {
            assert!((got - want).abs() < 1e-4, "{got} and {want}");
        }
    }

    #[test]
    fn the_seed_decides() {
        let model = TinyModel::llama().load();
        let texts = [text(2000)];
        let tokens = |seed| -> Vec<Vec<u32>> {
            let options = DumpOptions { seed, ..options() };
            plan(&model, &texts, &options).unwrap().into_iter().map(|p| p.tokens).collect()
        };
        assert_eq!(tokens(1), tokens(1));
        assert_ne!(tokens(1), tokens(2));
    }

    #[test]
    fn a_taken_folder_is_found_before_the_texts_are_read() {
        let model = TinyModel::llama().load();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("letter"), "dear").unwrap();
        let error = dump(&model, &[text(1)], folder.path(), &options(), &mut |_| {}).unwrap_err();
        assert!(error.to_string().contains("holds no dump"), "{error}");
    }

    #[test]
    fn bad_input_is_named_and_leaves_nothing() {
        let model = TinyModel::llama().load();
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("dump");
        let run = |texts: &[Text], change: fn(&mut DumpOptions)| {
            let mut options = options();
            change(&mut options);
            let error = dump(&model, texts, &dir, &options, &mut |_| {}).unwrap_err();
            assert!(!dir.exists());
            error.to_string()
        };
        let blank = Text { name: "blank".into(), text: " \n".into() };
        assert!(run(&[text(2000), blank], |_| {}).contains("text blank is empty"));
        let message = run(&[text(100)], |_| {});
        assert!(
            message.contains("has 100 tokens") && message.contains("288 are needed"),
            "{message}"
        );
        assert!(run(&[text(2000)], |o| o.prefix = 1..=600).contains("the model has 512"));
        assert!(run(&[text(2000)], |o| o.prefix = 5..=20).contains("too short to hide a fact"));
        assert!(run(&[text(2000)], |o| o.sequences = 0).contains("sequences"));
        assert!(run(&[text(2000)], |o| o.retrieval = 1.5).contains("between 0 and 1"));
        assert!(run(&[text(2000)], |o| o.draws = 0).contains("draws"));
        assert!(run(&[text(2000)], |o| o.sequences = usize::MAX).contains("sequences"));
        assert!(run(&[text(2000)], |o| o.draws = 2000).contains("draws: 2000 are more"));
        assert!(run(&[], |_| {}).contains("texts"));
    }
}
