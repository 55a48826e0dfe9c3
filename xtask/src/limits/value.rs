//! Computes what a constant's expression says, and prints it for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use quote::ToTokens as _;
use syn::{BinOp, Expr, Lit, UnOp};

/// The constants that an expression may name, by their own names.
pub(super) type Known = BTreeMap<String, Value>;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Number(i128),
    Fraction(f64),
    /// In nanoseconds.
    Duration(i128),
    /// What cannot be computed here, as it stands in the code.
    Text(String),
}

/// How a number is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    Plain,
    Bytes,
    Seconds,
}

impl Unit {
    /// Names say their unit last, where the type does not.
    pub(super) fn of_name(name: &str) -> Self {
        let name = name.to_lowercase();
        if name.contains("bytes") {
            Self::Bytes
        } else if name.ends_with("_seconds") {
            Self::Seconds
        } else {
            Self::Plain
        }
    }
}

const NANOS: i128 = 1_000_000_000;

impl Value {
    pub(super) fn of(expr: &Expr, known: &Known) -> Self {
        evaluate(expr, known).unwrap_or_else(|| Self::Text(expr.to_token_stream().to_string().replace(' ', "")))
    }

    pub(super) fn printed(&self, unit: Unit) -> String {
        match (self, unit) {
            (Self::Number(number), Unit::Plain) => grouped(*number),
            (Self::Number(number), Unit::Bytes) => bytes(*number),
            (Self::Number(number), Unit::Seconds) => duration(number * NANOS),
            (Self::Fraction(number), Unit::Seconds) => duration((number * NANOS as f64) as i128),
            (Self::Fraction(number), Unit::Plain | Unit::Bytes) => number.to_string(),
            (Self::Duration(nanos), _) => duration(*nanos),
            (Self::Text(text), _) => format!("`{text}`"),
        }
    }
}

fn evaluate(expr: &Expr, known: &Known) -> Option<Value> {
    match expr {
        Expr::Lit(literal) => match &literal.lit {
            Lit::Int(int) => int.base10_parse().ok().map(Value::Number),
            Lit::Float(float) => float.base10_parse().ok().map(Value::Fraction),
            _ => None,
        },
        Expr::Paren(inner) => evaluate(&inner.expr, known),
        Expr::Group(inner) => evaluate(&inner.expr, known),
        Expr::Cast(cast) => evaluate(&cast.expr, known),
        Expr::Unary(unary) if matches!(unary.op, UnOp::Neg(_)) => match evaluate(&unary.expr, known)? {
            Value::Number(number) => Some(Value::Number(-number)),
            Value::Fraction(_) | Value::Duration(_) | Value::Text(_) => None,
        },
        Expr::Binary(binary) => {
            let (left, right) = (evaluate(&binary.left, known)?, evaluate(&binary.right, known)?);
            let (Value::Number(left), Value::Number(right)) = (left, right) else {
                return None;
            };
            match binary.op {
                BinOp::Add(_) => left.checked_add(right),
                BinOp::Sub(_) => left.checked_sub(right),
                BinOp::Mul(_) => left.checked_mul(right),
                BinOp::Div(_) => left.checked_div(right),
                BinOp::Shl(_) => left.checked_mul(1i128.checked_shl(u32::try_from(right).ok()?)?),
                _ => None,
            }
            .map(Value::Number)
        }
        Expr::Path(path) => {
            let name = path.path.segments.last()?.ident.to_string();
            // `u64::MAX` is no constant of ours.
            (name != "MAX").then(|| known.get(&name).cloned())?
        }
        Expr::Call(call) => {
            let unit = duration_unit(&call.func)?;
            match evaluate(call.args.first()?, known)? {
                Value::Number(count) => Some(Value::Duration(count.checked_mul(unit)?)),
                Value::Fraction(count) => Some(Value::Duration((count * unit as f64) as i128)),
                Value::Duration(_) | Value::Text(_) => None,
            }
        }
        _ => None,
    }
}

/// The nanoseconds in what one of `Duration`'s constructors counts.
pub(super) fn duration_unit(function: &Expr) -> Option<i128> {
    let Expr::Path(path) = function else { return None };
    let mut segments = path.path.segments.iter().rev();
    let (constructor, of) = (segments.next()?, segments.next()?);
    if of.ident != "Duration" {
        return None;
    }
    match constructor.ident.to_string().as_str() {
        "from_nanos" => Some(1),
        "from_micros" => Some(NANOS / 1_000_000),
        "from_millis" => Some(NANOS / 1_000),
        "from_secs" | "from_secs_f64" => Some(NANOS),
        "from_mins" => Some(60 * NANOS),
        "from_hours" => Some(3_600 * NANOS),
        "from_days" => Some(86_400 * NANOS),
        _ => None,
    }
}

fn grouped(number: i128) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut text = if number < 0 { "-".to_owned() } else { String::new() };
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn bytes(number: i128) -> String {
    for (shift, name) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        let size = 1 << shift;
        if number >= size && number % size == 0 {
            return format!("{} {name}", grouped(number / size));
        }
    }
    format!("{} bytes", grouped(number))
}

/// In the largest units that need no fraction: `1 h 30 min`, `250 ms`.
fn duration(nanos: i128) -> String {
    let mut rest = nanos;
    let mut text = String::new();
    for (unit, name) in [
        (86_400 * NANOS, "days"),
        (3_600 * NANOS, "h"),
        (60 * NANOS, "min"),
        (NANOS, "s"),
        (1_000_000, "ms"),
        (1_000, "µs"),
        (1, "ns"),
    ] {
        let count = rest / unit;
        // "24 h" and "1 day" are both said; only from two days on are days shorter.
        if count == 0 || (name == "days" && (count == 1 || rest % unit != 0)) {
            continue;
        }
        rest -= count * unit;
        let space = if text.is_empty() { "" } else { " " };
        // Writing to a String cannot fail.
        let _ = write!(text, "{space}{} {name}", grouped(count));
    }
    if text.is_empty() { "0 s".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(expr: &str, unit: Unit) -> String {
        let known = Known::from([("OTHER".to_owned(), Value::Number(7))]);
        Value::of(&syn::parse_str(expr).unwrap(), &known).printed(unit)
    }

    #[test]
    fn values_are_printed_for_people() {
        for (expr, unit, expected) in [
            ("64 * 1024 * 1024", Unit::Bytes, "64 MiB"),
            ("1_500_000", Unit::Bytes, "1,500,000 bytes"),
            ("64 << 30", Unit::Bytes, "64 GiB"),
            ("100_000", Unit::Plain, "100,000"),
            ("100", Unit::Plain, "100"),
            ("OTHER as usize * 2", Unit::Plain, "14"),
            ("Duration::from_mins(5)", Unit::Plain, "5 min"),
            ("std::time::Duration::from_millis(1_500)", Unit::Plain, "1 s 500 ms"),
            ("Duration::from_hours(24)", Unit::Plain, "24 h"),
            ("Duration::from_hours(35 * 24)", Unit::Plain, "35 days"),
            ("Duration::ZERO", Unit::Plain, "`Duration::ZERO`"),
            ("2.5", Unit::Seconds, "2 s 500 ms"),
            ("u32::MAX", Unit::Plain, "`u32::MAX`"),
        ] {
            assert_eq!(printed(expr, unit), expected, "{expr}");
        }
    }
}
