//! Synthetic retrieval tasks inside a text: facts in the prefix that the decode positions ask for.
//!
//! Plain text rarely looks far back. A mask learned on it alone would cut the channels that find a
//! fact in a long context.

use leank_train::rng::Rng;

use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Most facts in one prefix.
const MAX_FACTS: usize = 8;

const NAMES: [&str; 24] = [
    "Amsterdam",
    "Bergen",
    "Cairo",
    "Dakar",
    "Edinburgh",
    "Florence",
    "Geneva",
    "Havana",
    "Istanbul",
    "Jakarta",
    "Kyoto",
    "Lima",
    "Madrid",
    "Nairobi",
    "Oslo",
    "Prague",
    "Quito",
    "Riga",
    "Sofia",
    "Tunis",
    "Utrecht",
    "Vienna",
    "Warsaw",
    "Zagreb",
];

/// A task: which tokens, and its name for people.
pub(crate) struct Task {
    pub(crate) tokens: Vec<u32>,
    pub(crate) name: &'static str,
}

/// Puts a task into `text` (prefix + positions tokens of it): facts into the prefix, at random
/// places, questions with their answers at the end of the decode positions.
///
/// # Errors
/// [`Error::Option`] when the prefix is too short for one fact.
pub(crate) fn embed(
    tokenizer: &Tokenizer,
    text: &[u32],
    prefix: usize,
    rng: &mut Rng,
) -> Result<Task> {
    let positions = text.len() - prefix;
    let passkey = rng.below(2) == 0;
    let (name, facts) =
        if passkey { ("passkey", vec![pass_key(rng)]) } else { ("key-value", key_values(rng)) };
    let mut needles = Vec::new();
    let mut room = prefix / 2;
    let mut kept = Vec::new();
    for fact in facts {
        let needle = tokenizer.encode_piece(&fact.statement)?;
        if needle.len() > room {
            break;
        }
        room -= needle.len();
        needles.push(needle);
        kept.push(fact);
    }
    if kept.is_empty() {
        let why = format!(
            "a prefix of {prefix} tokens is too short to hide a fact in; take longer prefixes or a retrieval share of 0"
        );
        return Err(Error::option("retrieval", why));
    }
    let questions = ask(tokenizer, &kept, passkey, positions, rng)?;
    let mut tokens = hide(&text[..prefix], needles, rng);
    tokens.extend(&text[prefix..text.len() - questions.len()]);
    tokens.extend(questions);
    Ok(Task { tokens, name })
}

struct Fact {
    statement: String,
    question: String,
}

/// A number of five digits.
pub(crate) fn number(rng: &mut Rng) -> usize {
    10_000 + rng.below(90_000)
}

/// The pass key of Mohtashami and Jaggi (2023), in words; what stands around them is the caller's.
pub(crate) struct PassKey(pub(crate) usize);

impl PassKey {
    /// The key follows, after a space.
    pub(crate) const QUESTION: &str = "What is the pass key? The pass key is";

    pub(crate) fn statement(&self) -> String {
        let key = self.0;
        format!("The pass key is {key}. Remember it. {key} is the pass key.")
    }
}

fn pass_key(rng: &mut Rng) -> Fact {
    let key = PassKey(number(rng));
    Fact {
        statement: format!("\n\n{}\n\n", key.statement()),
        question: format!("\n\n{} {}.", PassKey::QUESTION, key.0),
    }
}

fn key_values(rng: &mut Rng) -> Vec<Fact> {
    let mut names = NAMES;
    rng.shuffle(&mut names);
    let fact = |name: &&str| {
        let value = number(rng);
        Fact {
            statement: format!("\nThe secret number of {name} is {value}.\n"),
            question: format!(
                "\nWhat is the secret number of {name}? The secret number of {name} is {value}."
            ),
        }
    };
    names[..MAX_FACTS].iter().map(fact).collect()
}

/// Questions and answers: one for a pass key, otherwise as many as fill the positions, over and
/// over in new orders. At most `positions` tokens, the end kept, since answers come last.
fn ask(
    tokenizer: &Tokenizer,
    facts: &[Fact],
    once: bool,
    positions: usize,
    rng: &mut Rng,
) -> Result<Vec<u32>> {
    let mut questions = facts
        .iter()
        .map(|fact| tokenizer.encode_piece(&fact.question))
        .collect::<Result<Vec<_>>>()?;
    let mut asked = Vec::new();
    while asked.len() < positions {
        rng.shuffle(&mut questions);
        asked.extend(questions.iter().flatten().copied());
        if once || asked.is_empty() {
            break;
        }
    }
    let surplus = asked.len().saturating_sub(positions);
    Ok(asked.split_off(surplus))
}

/// As many tokens as `text` has: the needles at random places, text between.
pub(crate) fn hide(text: &[u32], mut needles: Vec<Vec<u32>>, rng: &mut Rng) -> Vec<u32> {
    let inserted: usize = needles.iter().map(Vec::len).sum();
    let around = &text[..text.len() - inserted];
    rng.shuffle(&mut needles);
    // Never before the first token: it may be BOS.
    let mut places: Vec<usize> =
        needles.iter().map(|_| 1 + rng.below(around.len().max(2) - 1)).collect();
    places.sort_unstable();
    let mut tokens = Vec::with_capacity(text.len());
    let mut from = 0;
    for (place, needle) in places.into_iter().zip(needles) {
        let place = place.min(around.len());
        tokens.extend(&around[from..place]);
        tokens.extend(needle);
        from = place;
    }
    tokens.extend(&around[from..]);
    tokens
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TinyModel;

    #[test]
    fn facts_lie_in_the_prefix_and_answers_at_the_end() {
        let model = TinyModel::llama().load();
        let tokenizer = model.tokenizer();
        let text = vec![u32::from(b'x'); 1200];
        let mut seen = Vec::new();
        for seed in 0..12 {
            let task = embed(tokenizer, &text, 1000, &mut Rng::new(seed)).unwrap();
            assert_eq!(task.tokens.len(), 1200);
            let prompt = tokenizer.decode(&task.tokens[..1000]).unwrap();
            let answer = tokenizer.decode(&task.tokens[1000..]).unwrap();
            let digits = |text: &str| -> String {
                text.chars().rev().skip(1).take_while(char::is_ascii_digit).collect()
            };
            let value: String = digits(&answer).chars().rev().collect();
            assert_eq!(value.len(), 5, "{answer}");
            assert!(prompt.contains(&value), "{value} is not in the prompt");
            seen.push(task.name);
        }
        assert!(seen.contains(&"passkey") && seen.contains(&"key-value"));
    }

    #[test]
    fn a_prefix_without_room_is_an_error() {
        let model = TinyModel::llama().load();
        let text = vec![1; 60];
        let result = embed(model.tokenizer(), &text, 40, &mut Rng::new(0));
        assert!(matches!(result, Err(Error::Option { option: "retrieval", .. })));
    }
}
