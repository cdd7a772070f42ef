//! Records of runs: what a dump and a mask tell of how they came about.

use std::path::{Path, PathBuf};

use leank::{
    InputRecord, ModelMask, RunRecord,
    candle::Text,
    files::{sha256_hex, sha256_of_file},
};

/// Flags that change nothing in what is written: with a value, and without.
const OTHER: ([&str; 5], [&str; 4]) = (
    ["--out", "--pareto", "--progress", "--records", "--threads"],
    ["--json", "--overwrite", "--quiet", "-q"],
);

/// The run of this process: its command, but for what the result does not depend on.
pub(crate) fn this_run(seed: u64, inputs: Vec<InputRecord>) -> RunRecord {
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    RunRecord {
        command: command(words),
        created_by: concat!("leank ", env!("CARGO_PKG_VERSION")).into(),
        seed,
        inputs,
    }
}

fn command(words: impl Iterator<Item = String>) -> Vec<String> {
    let (with_value, alone) = OTHER;
    let mut command = vec!["leank".to_owned()];
    let mut words = words;
    while let Some(word) = words.next() {
        let flag = word.split('=').next().unwrap_or_default();
        if with_value.contains(&flag) {
            if flag == word {
                words.next();
            }
        } else if !alone.contains(&flag) {
            command.push(word);
        }
    }
    command
}

/// Files that a run reads in a role. A folder is all the files in it, by name.
///
/// # Errors
/// Where a file cannot be read.
pub(crate) fn inputs(role: &str, paths: &[PathBuf]) -> anyhow::Result<Vec<InputRecord>> {
    let mut inputs = Vec::new();
    for path in paths {
        for file in files(path) {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            inputs.push(InputRecord { role: role.into(), name, sha256: sha256_of_file(&file)? });
        }
    }
    Ok(inputs)
}

/// Texts that a run has read. They are not read again: a pipe has only one reading in it.
pub(crate) fn texts(texts: &[Text]) -> Vec<InputRecord> {
    let record = |Text { name, text }: &Text| InputRecord {
        role: "text".into(),
        name: name.clone(),
        sha256: sha256_hex(text.as_bytes()),
    };
    texts.iter().map(record).collect()
}

/// The names of those texts that the mask says it was learned from; `None` where there is none.
pub(crate) fn learned_from(mask: &ModelMask, texts: &[InputRecord]) -> Option<String> {
    let runs = &mask.info().runs;
    let of_mask = |text: &&InputRecord| {
        runs.iter().flat_map(|run| run.inputs_of("text")).any(|own| own.sha256 == text.sha256)
    };
    let names: Vec<&str> = texts.iter().filter(of_mask).map(|text| text.name.as_str()).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

fn files(path: &Path) -> Vec<PathBuf> {
    // What cannot be listed is met again as a file, with its error.
    let Ok(entries) = std::fs::read_dir(path) else { return vec![path.to_owned()] };
    let mut files: Vec<_> =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use leank::{ChannelMask, MaskInfo};

    use super::*;

    #[test]
    fn texts_are_known_by_what_is_in_them() {
        let text = |role: &str, name: &str, sha256: &str| InputRecord {
            role: role.into(),
            name: name.into(),
            sha256: sha256.into(),
        };
        let run = RunRecord {
            command: Vec::new(),
            created_by: String::new(),
            seed: 0,
            inputs: vec![text("model", "m", "aa"), text("text", "a.txt", "bb")],
        };
        let head = ChannelMask::new(4, vec![1]).unwrap();
        let mask = ModelMask::new(1, 1, 4, vec![head]).unwrap();
        let info = MaskInfo { runs: vec![run], ..MaskInfo::default() };
        let mask = mask.with_info(info).unwrap();
        let given = [text("text", "a.txt", "aa"), text("text", "renamed.txt", "bb")];
        assert_eq!(learned_from(&mask, &given).as_deref(), Some("renamed.txt"));
        assert_eq!(learned_from(&mask, &given[..1]), None);
    }

    #[test]
    fn a_command_is_what_the_result_depends_on() {
        let words = "--threads 2 learn dump --bytes 0.2 --out=a b -q --progress json --records r c";
        let found = command(words.split(' ').map(Into::into));
        assert_eq!(found.join(" "), "leank learn dump --bytes 0.2 b c");
    }
}
