//! Words of a Dockerfile line: splitting them, and what they come to once quotes are removed and
//! variables replaced. The rules are those of `BuildKit`'s shell lexer, which differ from a shell's: there
//! is no word splitting after expansion, no globbing and no command substitution.

use crate::patterns;

/// `${a:-${b:-…}}` nests at most this deep: the expansion recurses, and the text is a stranger's.
const MAX_NESTING: usize = 32;

/// The longest value that variables may grow to. `execve` refuses longer ones anyway, and without a
/// limit `ENV A=$A$A` doubles a value with every line.
const MAX_VALUE_BYTES: usize = 128 * 1024;

/// The longest value that `${name%pattern}` and its like work on: matching tries every part of it.
const MAX_MATCHED_BYTES: usize = 1024;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WordError {
    #[error("a {quote} quote is never closed in: {word}")]
    UnclosedQuote { quote: char, word: String },
    #[error("a variable reference is never closed in: {word}")]
    UnclosedVariable { word: String },
    #[error("'${{{text}…' is not a supported variable reference in: {word}")]
    UnsupportedModifier { text: String, word: String },
    #[error("{name}: {message}")]
    Required { name: String, message: String },
    #[error("variables are nested more than {MAX_NESTING} deep in: {word}")]
    TooDeep { word: String },
    #[error("a value grows beyond {MAX_VALUE_BYTES} bytes in: {word}")]
    TooLong { word: String },
    #[error("a value of more than {MAX_MATCHED_BYTES} bytes cannot be matched with a pattern in: {word}")]
    TooLongToMatch { word: String },
}

/// Splits at blanks outside of quotes. Words keep their quotes and escapes.
pub fn split(text: &str, escape: char) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote: Option<char> = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match quote {
            None if c.is_whitespace() => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                continue;
            }
            None if c == '"' || c == '\'' => quote = Some(c),
            Some(open) if c == open => quote = None,
            None | Some(_) => {}
        }
        word.push(c);
        // Single quotes know no escapes.
        if c == escape
            && quote != Some('\'')
            && let Some(next) = chars.next()
        {
            word.push(next);
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

/// What a word comes to: quotes and escapes removed, variables replaced by what `lookup` says.
pub fn expand(word: &str, escape: char, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, WordError> {
    let mut lexer = Lexer {
        chars: word.chars().collect(),
        at: 0,
        escape,
        lookup,
        word,
        depth: 0,
    };
    lexer.until(None)
}

struct Lexer<'a> {
    chars: Vec<char>,
    at: usize,
    escape: char,
    lookup: &'a dyn Fn(&str) -> Option<String>,
    /// For messages.
    word: &'a str,
    depth: usize,
}

impl Lexer<'_> {
    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += 1;
        Some(c)
    }

    /// Reads to the end of the text, or to an unquoted `stop`, which is left unread.
    fn until(&mut self, stop: Option<&[char]>) -> Result<String, WordError> {
        let mut out = String::new();
        while let Some(c) = self.peek() {
            if stop.is_some_and(|stop| stop.contains(&c)) {
                return self.bounded(out);
            }
            match c {
                '\'' => self.single_quoted(&mut out)?,
                '"' => self.double_quoted(&mut out)?,
                '$' => out.push_str(&self.variable()?),
                _ if c == self.escape => {
                    self.at += 1;
                    out.extend(self.next());
                }
                _ => {
                    self.at += 1;
                    out.push(c);
                }
            }
            if out.len() > MAX_VALUE_BYTES {
                return self.bounded(out);
            }
        }
        match stop {
            Some(_) => Err(WordError::UnclosedVariable { word: self.shown() }),
            None => self.bounded(out),
        }
    }

    fn single_quoted(&mut self, out: &mut String) -> Result<(), WordError> {
        self.at += 1;
        loop {
            match self.next() {
                Some('\'') => return Ok(()),
                Some(c) => out.push(c),
                None => {
                    return Err(WordError::UnclosedQuote {
                        quote: '\'',
                        word: self.shown(),
                    });
                }
            }
        }
    }

    fn double_quoted(&mut self, out: &mut String) -> Result<(), WordError> {
        self.at += 1;
        loop {
            if out.len() > MAX_VALUE_BYTES {
                return Err(WordError::TooLong { word: self.shown() });
            }
            match self.peek() {
                Some('"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some('$') => out.push_str(&self.variable()?),
                Some(c) if c == self.escape => {
                    self.at += 1;
                    match self.next() {
                        // Before anything else the escape stands for itself: "C:\dir".
                        Some(next) if next == '"' || next == '$' || next == self.escape => out.push(next),
                        Some(next) => out.extend([c, next]),
                        None => {
                            return Err(WordError::UnclosedQuote {
                                quote: '"',
                                word: self.shown(),
                            });
                        }
                    }
                }
                Some(c) => {
                    self.at += 1;
                    out.push(c);
                }
                None => {
                    return Err(WordError::UnclosedQuote {
                        quote: '"',
                        word: self.shown(),
                    });
                }
            }
        }
    }

    fn variable(&mut self) -> Result<String, WordError> {
        self.at += 1;
        if self.peek() == Some('{') {
            self.at += 1;
            self.depth += 1;
            if self.depth > MAX_NESTING {
                return Err(WordError::TooDeep { word: self.shown() });
            }
            let value = self.braced()?;
            self.depth -= 1;
            return Ok(value);
        }
        let name = self.name();
        if name.is_empty() {
            return Ok("$".to_owned());
        }
        Ok((self.lookup)(&name).unwrap_or_default())
    }

    fn name(&mut self) -> String {
        let mut name = String::new();
        match self.peek() {
            // `$1`, `$@` and the like: a shell would know them, a Dockerfile has none.
            Some(c) if c.is_ascii_digit() || matches!(c, '@' | '*' | '#' | '?' | '!') => {
                self.at += 1;
                name.push(c);
            }
            Some(c) if c.is_ascii_alphabetic() || c == '_' => {
                while let Some(c) = self.peek().filter(|c| c.is_ascii_alphanumeric() || *c == '_') {
                    self.at += 1;
                    name.push(c);
                }
            }
            Some(_) | None => {}
        }
        name
    }

    /// The inside of `${…}` and its closing brace.
    fn braced(&mut self) -> Result<String, WordError> {
        let name = self.name();
        let value = (self.lookup)(&name);
        let Some(mut modifier) = self.next() else {
            return Err(WordError::UnclosedVariable { word: self.shown() });
        };
        let unsupported = |lexer: &Self, modifier: char| WordError::UnsupportedModifier {
            text: format!("{name}{modifier}"),
            word: lexer.shown(),
        };
        if name.is_empty() {
            return Err(unsupported(self, modifier));
        }
        if modifier == '}' {
            return Ok(value.unwrap_or_default());
        }
        let colon = modifier == ':';
        if colon {
            modifier = self
                .next()
                .ok_or_else(|| WordError::UnclosedVariable { word: self.shown() })?;
        }
        // With a colon, empty counts as unset.
        let present = value.as_ref().is_some_and(|value| !colon || !value.is_empty());
        let value = value.unwrap_or_default();
        if matches!(modifier, '#' | '%' | '/') && value.len() > MAX_MATCHED_BYTES {
            return Err(WordError::TooLongToMatch { word: self.shown() });
        }
        match modifier {
            '-' => {
                let word = self.operand()?;
                Ok(if present { value } else { word })
            }
            '+' => {
                let word = self.operand()?;
                Ok(if present { word } else { String::new() })
            }
            '?' => {
                let message = self.operand()?;
                if present {
                    return Ok(value);
                }
                let message = if message.is_empty() {
                    "is not allowed to be unset".to_owned()
                } else {
                    message
                };
                Err(WordError::Required { name, message })
            }
            '#' | '%' if !colon => {
                let longest = self.peek() == Some(modifier);
                if longest {
                    self.at += 1;
                }
                let pattern = self.operand()?;
                Ok(patterns::trim(&value, &pattern, modifier == '#', longest))
            }
            '/' if !colon => {
                let all = self.peek() == Some('/');
                if all {
                    self.at += 1;
                }
                let pattern = self.until(Some(&['/', '}']))?;
                let replacement = if self.next() == Some('/') {
                    self.operand()?
                } else {
                    String::new()
                };
                self.bounded(patterns::replace(&value, &pattern, &replacement, all))
            }
            other => Err(unsupported(self, other)),
        }
    }

    fn operand(&mut self) -> Result<String, WordError> {
        let word = self.until(Some(&['}']))?;
        self.at += 1;
        Ok(word)
    }

    fn bounded(&self, value: String) -> Result<String, WordError> {
        if value.len() > MAX_VALUE_BYTES {
            return Err(WordError::TooLong { word: self.shown() });
        }
        Ok(value)
    }

    fn shown(&self) -> String {
        self.word.chars().take(200).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn expanded(word: &str) -> Result<String, WordError> {
        expand(word, '\\', &|name| match name {
            "A" => Some("alpha".to_owned()),
            "EMPTY" => Some(String::new()),
            "FILE" => Some("a.tar.gz".to_owned()),
            _ => None,
        })
    }

    #[test]
    fn words_split_outside_of_quotes_only() {
        assert_eq!(
            split(r#"a "b c" d\ e 'f\' "g\" h""#, '\\'),
            ["a", r#""b c""#, r"d\ e", r"'f\'", r#""g\" h""#]
        );
        assert_eq!(split("  \t ", '\\'), Vec::<String>::new());
    }

    #[test]
    fn expansion_follows_the_rules_of_buildkit() {
        for (word, wanted) in [
            ("plain", "plain"),
            ("'b c'", "b c"),
            (r#""x $A y""#, "x alpha y"),
            ("'$A'", "$A"),
            (r"\$A", "$A"),
            (r#""\$A \n""#, r"$A \n"),
            ("${A}b", "alphab"),
            ("$Ab", ""),
            ("$", "$"),
            ("a$", "a$"),
            ("${NONE:-x}", "x"),
            ("${EMPTY:-x}", "x"),
            ("${EMPTY-x}", ""),
            ("${NONE-x}", "x"),
            ("${A:+x}", "x"),
            ("${EMPTY:+x}", ""),
            ("${EMPTY+x}", "x"),
            ("${NONE:-${A:-y}}", "alpha"),
            ("${A:?}", "alpha"),
            ("${FILE%.*}", "a.tar"),
            ("${FILE%%.*}", "a"),
            ("${FILE#*.}", "tar.gz"),
            ("${FILE##*.}", "gz"),
            ("${FILE/a/b}", "b.tar.gz"),
            ("${FILE//a/b}", "b.tbr.gz"),
            ("$1x", "x"),
        ] {
            assert_eq!(expanded(word).as_deref(), Ok(wanted), "{word}");
        }
    }

    #[test]
    fn what_cannot_be_expanded_says_why() {
        assert!(matches!(
            expanded("'a"),
            Err(WordError::UnclosedQuote { quote: '\'', .. })
        ));
        assert!(matches!(
            expanded("\"a"),
            Err(WordError::UnclosedQuote { quote: '"', .. })
        ));
        assert!(matches!(expanded("${A"), Err(WordError::UnclosedVariable { .. })));
        assert!(matches!(expanded("${A:-x"), Err(WordError::UnclosedVariable { .. })));
        assert!(matches!(expanded("${A^}"), Err(WordError::UnsupportedModifier { .. })));
        assert!(matches!(expanded("${}"), Err(WordError::UnsupportedModifier { .. })));
        assert_eq!(expanded("${NONE:?set it}").unwrap_err().to_string(), "NONE: set it");
        assert!(matches!(
            expanded(&"${N:-".repeat(1000)),
            Err(WordError::TooDeep { .. })
        ));
    }

    #[test]
    fn a_value_cannot_grow_without_limit() {
        let big = "x".repeat(MAX_VALUE_BYTES / 2 + 1);
        let result = expand("$A$A", '\\', &|_| Some(big.clone()));
        assert!(matches!(result, Err(WordError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn quoting_keeps_any_text(text in "[^']*") {
            // What the client does with `ENV KEY=<quoted>`.
            let word = format!("'{text}'");
            prop_assert_eq!(expand(&word, '\\', &|_| None), Ok(text));
        }

        #[test]
        fn no_text_makes_the_lexer_panic(text in "[${}:\\-+?#%/'\"\\\\a-c ]{0,60}") {
            let _ = expand(&text, '\\', &|name| (name == "a").then(|| "value".to_owned()));
            let words = split(&text, '\\');
            prop_assert!(words.iter().all(|word| !word.is_empty()));
        }
    }
}
