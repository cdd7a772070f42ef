//! Retrieval tasks: something is hidden in a text and asked for at its end.
//!
//! They are what a perplexity does not show: whether decoding still finds *one* token far back.
//! The forms follow RULER (Hsieh et al. 2024) and the passkey task (Mohtashami and Jaggi 2023);
//! answers are short, so that a task is right where the most likely token is right at every
//! position of the answer, which is what greedy decoding would give.

use std::fmt;

use crate::rng::Rng;
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

    /// The task of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.to_string() == name)
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

fn number(rng: &mut Rng, digits: u32) -> String {
    let low = 10usize.pow(digits - 1);
    (low + rng.below(9 * low)).to_string()
}

fn riddle(task: Task, rng: &mut Rng) -> Riddle {
    if task == Task::Passkey {
        let key = number(rng, 5);
        return Riddle {
            hidden: vec![format!("\nThe pass key is {key}. Remember it. {key} is the pass key.\n")],
            question: "\nWhat is the pass key? The pass key is".into(),
            answer: format!(" {key}"),
        };
    }
    let mut things = THINGS;
    rng.shuffle(&mut things);
    let things = &things[..if task == Task::MultiKey { 4 } else { 1 }];
    let numbers: Vec<String> = things.iter().map(|_| number(rng, 5)).collect();
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
/// [`Error::Mismatch`] when `text` is too short or `length` leaves no room for the task;
/// [`Error::Tokenizer`].
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
    let mut hidden = riddle
        .hidden
        .iter()
        .map(|text| tokenizer.encode_piece(text))
        .collect::<Result<Vec<_>>>()?;
    let added: usize = hidden.iter().map(Vec::len).sum::<usize>() + whole.len();
    let hay = length.checked_sub(added).filter(|hay| *hay > 0 && *hay <= text.len());
    let Some(hay) = hay else {
        let expected = format!("at least {} tokens of text", length.saturating_sub(added).max(1));
        return Err(Error::mismatch("text under a retrieval task", expected, text.len()));
    };
    let mut places: Vec<usize> = hidden.iter().map(|_| rng.below(hay)).collect();
    places.sort_unstable();
    let mut tokens = Vec::with_capacity(length);
    let mut from = 0;
    for (place, hidden) in places.into_iter().zip(&mut hidden) {
        tokens.extend_from_slice(&text[from..place]);
        tokens.append(hidden);
        from = place;
    }
    tokens.extend_from_slice(&text[from..hay]);
    let question = tokens.len();
    tokens.extend_from_slice(&whole);
    Ok(TaskItem { answer: question + shared, question, tokens })
}
