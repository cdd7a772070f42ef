//! Dumps activations of a model on text files, with times.
//!
//! ```text
//! cargo run --release -p leank-candle --example dump -- MODEL OUT_DIR SEQUENCES TEXT...
//! ```

use std::path::Path;
use std::time::Instant;

use leank_candle::{DumpOptions, LoadOptions, Model, Text, dump};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, out, sequences, texts @ ..] = args.as_slice() else {
        return Err("usage: dump MODEL OUT_DIR SEQUENCES TEXT...".into());
    };
    let model = Model::load(Path::new(model), LoadOptions::default())?;
    let texts = texts
        .iter()
        .map(|name| Ok(Text { name: name.clone(), text: std::fs::read_to_string(name)? }))
        .collect::<std::io::Result<Vec<_>>>()?;
    let options = DumpOptions { sequences: sequences.parse()?, ..DumpOptions::default() };
    let start = Instant::now();
    let manifest = dump(&model, &texts, Path::new(out), &options, &mut |p| {
        eprintln!("{} of {} sequences after {:.1?}", p.done, p.sequences, start.elapsed());
    })?;
    for sequence in &manifest.sequences {
        println!("{:>6} tokens, {}", sequence.prefix, sequence.source);
    }
    Ok(())
}
