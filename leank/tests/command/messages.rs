//! Every error message that the tests provoke, as a list to read: `tests/messages.txt`.
//!
//! A message that is not in the list fails its test. `LEANK_MESSAGES=write cargo nextest run -p leank
//! --all-features` adds those that are new; delete the file first to forget old ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{File, OpenOptions},
    io::{Read as _, Seek as _, Write as _},
    path::Path,
};

const LIST: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/messages.txt");

/// Messages by the command that gives them.
type Messages = BTreeMap<String, BTreeSet<String>>;

/// Checks that the list has this message; `folder` is where the command ran.
pub(crate) fn check(arguments: &str, message: &str, folder: &Path) {
    let command = arguments.split_whitespace().collect::<Vec<_>>().join(" ");
    let message = message.trim_end().replace(&folder.display().to_string(), "/FOLDER");
    let message: Vec<&str> = message.split(' ').map(same_everywhere).collect();
    let message = message.join(" ");
    let write = std::env::var("LEANK_MESSAGES").is_ok_and(|how| how == "write");
    let mut file = OpenOptions::new().read(true).write(write).create(write).open(LIST).unwrap();
    if write {
        file.lock().unwrap();
    }
    let mut known = read(&mut file);
    if !known.get(&command).is_some_and(|known| known.contains(&message)) {
        assert!(
            write,
            "not in {LIST}; read it, then add it (see messages.rs):\n{command}\n{message}"
        );
        known.entry(command).or_default().insert(message);
        store(&mut file, &known);
    }
}

/// Checksums and ids are of activations, which another kind of CPU rounds otherwise.
fn same_everywhere(word: &str) -> &str {
    let is_hex = word.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_hex && matches!(word.len(), 8 | 64) { "HEX" } else { word }
}

fn read(file: &mut File) -> Messages {
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    let (mut known, mut command) = (Messages::new(), String::new());
    for line in text.lines() {
        match line.strip_prefix("$ leank ") {
            Some(own) => command = own.into(),
            None => drop(known.entry(command.clone()).or_default().insert(line.trim().into())),
        }
    }
    known
}

fn store(file: &mut File, known: &Messages) {
    let mut text = String::new();
    for (command, messages) in known {
        text += &format!("$ leank {command}\n");
        messages.iter().for_each(|message| text += &format!("    {message}\n"));
    }
    file.set_len(0).unwrap();
    file.rewind().unwrap();
    file.write_all(text.as_bytes()).unwrap();
}
