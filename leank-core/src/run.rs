//! How a file came about: enough to make it again.

/// The run of a command that made a file. A mask carries those that led to it, so that it can be
/// reproduced: the same inputs through the same commands give the same bytes on the same machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "files", derive(serde::Serialize, serde::Deserialize))]
pub struct RunRecord {
    /// The command and its arguments, as they were given.
    pub command: Vec<String>,
    /// What ran it, with versions, e.g. `leank 0.1.0`.
    pub created_by: String,
    /// Seed of everything random.
    pub seed: u64,
    /// What it read, in the order given.
    pub inputs: Vec<InputRecord>,
}

/// Something that a run read.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "files", derive(serde::Serialize, serde::Deserialize))]
pub struct InputRecord {
    /// What it was to the run: `model`, `text`, `dump`.
    pub role: String,
    /// Its name, for people: of a file, without folders.
    pub name: String,
    /// SHA-256 of its bytes in hexadecimal, or the id of a dump.
    pub sha256: String,
}

impl RunRecord {
    /// The inputs of a role.
    pub fn inputs_of<'a>(&'a self, role: &'a str) -> impl Iterator<Item = &'a InputRecord> {
        self.inputs.iter().filter(move |input| input.role == role)
    }

    /// The command as one line for a POSIX shell: what it does not take as it is stands in quotes.
    #[must_use]
    pub fn shell_line(&self) -> String {
        self.command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
    }
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:+%@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_the_line_as_the_command() {
        let command = ["leank", "dump", "--text", "it's here.txt", "", "a$b", "--bytes=0.2"];
        let run = RunRecord { command: command.map(Into::into).into(), ..RunRecord::default() };
        assert_eq!(run.shell_line(), r"leank dump --text 'it'\''s here.txt' '' 'a$b' --bytes=0.2");
    }

    #[test]
    fn inputs_are_found_by_their_role() {
        let input = |role: &str, name: &str| InputRecord {
            role: role.into(),
            name: name.into(),
            sha256: String::new(),
        };
        let inputs = vec![input("text", "a"), input("model", "m"), input("text", "b")];
        let run = RunRecord { inputs, ..RunRecord::default() };
        let names = |role| run.inputs_of(role).map(|input| input.name.as_str()).collect::<Vec<_>>();
        assert_eq!(
            (names("text"), names("model"), names("dump")),
            (vec!["a", "b"], vec!["m"], vec![])
        );
    }
}
