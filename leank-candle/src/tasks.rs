//! Retrieval tasks: something is hidden in a text and asked for at its end.
//!
//! They are what a perplexity does not show: whether decoding still finds *one* token far back.
//! The forms follow RULER (Hsieh et al. 2024) and the passkey task (Mohtashami and Jaggi 2023);
//! answers are short, so that a task is right where the most likely token is right at every
//! position of the answer, which is what greedy decoding would give.

use std::{fmt, str::FromStr};

use leank_train::rng::Rng;

use crate::retrieval::{PassKey, hide, number};
use crate::{Error, Result, Tokenizer};

/// A retrieval task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Task {
    /// One five-digit pass key.
    Passkey,
    /// One number for a named thing.
    Needle,
    /// Four numbers for four things, of which one is asked for.
    MultiKey,
}

impl Task {
    /// Every task.
    pub const ALL: [Self; 3] = [Self::Passkey, Self::Needle, Self::MultiKey];
}

impl FromStr for Task {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|task| task.to_string() == name).ok_or_else(|| {
            let names = Self::ALL.map(|task| task.to_string()).join(", ");
            Error::option("task", format!("{name:?} is none of {names}"))
        })
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Passkey => "passkey",
            Self::Needle => "needle",
            Self::MultiKey => "multikey",
        })
    }
}

/// A task laid out in tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskItem {
    /// Text with what is hidden in it, then question and answer.
    pub tokens: Vec<u32>,
    /// Where the question begins.
    pub question: usize,
    /// Where the answer begins.
    pub answer: usize,
}

const THINGS: [&str; 24] = [
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "harbor", "island",
    "jacket", "kettle", "ladder", "mirror", "needle", "orchid", "pillow", "quarry", "ribbon",
    "saddle", "temple", "umbrella", "valley", "window", "zebra",
];

struct Riddle {
    hidden: Vec<String>,
    question: String,
    answer: String,
}

fn riddle(task: Task, rng: &mut Rng) -> Riddle {
    if task == Task::Passkey {
        let key = PassKey(number(rng));
        return Riddle {
            hidden: vec![format!("\n{}\n", key.statement())],
            question: format!("\n{}", PassKey::QUESTION),
            answer: format!(" {}", key.0),
        };
    }
    let mut things = THINGS;
    rng.shuffle(&mut things);
    let things = &things[..if task == Task::MultiKey { 4 } else { 1 }];
    let numbers: Vec<usize> = things.iter().map(|_| number(rng)).collect();
    let fact = |(thing, number)| format!("\nThe special magic number for {thing} is {number}.\n");
    let asked = rng.below(things.len());
    let thing = things[asked];
    Riddle {
        hidden: things.iter().zip(&numbers).map(fact).collect(),
        question: format!(
            "\nWhat is the special magic number for {thing}? The special magic number for {thing} is"
        ),
        answer: format!(" {}", numbers[asked]),
    }
}

/// Lays a task out over the start of `text` so that it has exactly `length` tokens.
///
/// # Errors
/// [`Error::Mismatch`] when `text` is too short or `length` leaves no room for the task, and when the
/// vocabulary cannot say what is hidden or answered; [`Error::Tokenizer`].
pub(crate) fn lay_out(
    task: Task,
    tokenizer: &Tokenizer,
    text: &[u32],
    length: usize,
    rng: &mut Rng,
) -> Result<TaskItem> {
    let riddle = riddle(task, rng);
    let asking = tokenizer.encode_piece(&riddle.question)?;
    let whole = tokenizer.encode_piece(&(riddle.question.clone() + &riddle.answer))?;
    let shared = asking.iter().zip(&whole).take_while(|(a, b)| a == b).count();
    let hidden = riddle
        .hidden
        .iter()
        .map(|text| tokenizer.encode_piece(text))
        .collect::<Result<Vec<_>>>()?;
    // What has no tokens is neither hidden nor asked for, and nothing is easy to get right.
    let says = |tokens: &[u32]| -> Result<bool> {
        Ok(tokenizer.decode(tokens)?.contains(riddle.answer.trim()))
    };
    if asking.is_empty() || !says(&whole[shared..])? || !says(&hidden.concat())? {
        let expected = "tokens for English words and digits, which retrieval tasks are made of";
        let found = format!("a vocabulary of {} without", tokenizer.vocab());
        return Err(Error::mismatch("vocabulary", expected, found));
    }
    let added: usize = hidden.iter().map(Vec::len).sum();
    let before = length.saturating_sub(whole.len());
    if before <= added || before > text.len() {
        let expected = format!("more than {} and at most {}", added + whole.len(), text.len());
        return Err(Error::mismatch("tokens of a retrieval task", expected, length));
    }
    let mut tokens = hide(&text[..before], hidden, rng);
    let question = tokens.len();
    tokens.extend_from_slice(&whole);
    Ok(TaskItem { answer: question + shared, question, tokens })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision;
    use crate::testing::{TinyModel, load};

    #[test]
    fn what_a_vocabulary_cannot_say_is_no_task() {
        let tiny = TinyModel::llama();
        let folder = tiny.write_folder();
        let letters = r#"{"version": "1.0", "model": {"type": "BPE", "vocab": {"i": 0, "s": 1, "t": 2},
            "merges": []}}"#;
        std::fs::write(folder.join("tokenizer.json"), letters).unwrap();
        let model = load(&folder, Precision::F32).unwrap();
        for task in Task::ALL {
            let text = vec![0; 2000];
            let error = lay_out(task, model.tokenizer(), &text, 900, &mut Rng::new(1)).unwrap_err();
            assert!(error.to_string().contains("digits"), "{error}");
        }
    }

    #[test]
    fn the_answer_is_hidden_once_and_asked_for_at_the_end() {
        let model = TinyModel::llama().load();
        let tokenizer = model.tokenizer();
        let text = vec![u32::from(b'x'); 2000];
        for task in Task::ALL {
            for seed in 0..10 {
                let item = lay_out(task, tokenizer, &text, 900, &mut Rng::new(seed)).unwrap();
                assert_eq!(item.tokens.len(), 900);
                let hidden = tokenizer.decode(&item.tokens[..item.question]).unwrap();
                let question = tokenizer.decode(&item.tokens[item.question..item.answer]).unwrap();
                let answer = tokenizer.decode(&item.tokens[item.answer..]).unwrap();
                let answer = answer.trim();
                assert!(
                    answer.len() == 5 && answer.bytes().all(|b| b.is_ascii_digit()),
                    "{answer}"
                );
                assert!(hidden.contains(answer) && !question.contains(answer));
                let facts = hidden.matches("number for").count();
                let expected = match task {
                    Task::Passkey => 0,
                    Task::Needle => 1,
                    Task::MultiKey => 4,
                };
                assert_eq!(facts, expected);
            }
        }
    }

    #[test]
    fn names_are_read_back() {
        for task in Task::ALL {
            assert_eq!(task.to_string().parse::<Task>().unwrap(), task);
        }
        let message = "singing".parse::<Task>().unwrap_err().to_string();
        assert!(message.contains("passkey, needle, multikey"), "{message}");
    }

    #[test]
    fn no_room_is_an_error() {
        let model = TinyModel::llama().load();
        let text = vec![1; 2000];
        let mut rng = Rng::new(0);
        assert!(lay_out(Task::MultiKey, model.tokenizer(), &text, 100, &mut rng).is_err());
        assert!(lay_out(Task::Passkey, model.tokenizer(), &text, 3000, &mut rng).is_err());
    }
}
