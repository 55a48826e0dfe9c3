//! Reads the numbers of the code, the tests and the settings.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};
use syn::{Attribute, Expr, ExprCall, ExprLit, ExprStruct, ImplItemFn, ItemFn, ItemImpl, ItemMod, Lit, Meta, Type};

use super::value::{Known, Unit, Value, duration_unit};

/// Types of numbers. A constant of another type is a name, a table or a piece of text.
const NUMBERS: &[&str] = &[
    "usize",
    "u64",
    "u32",
    "u16",
    "u8",
    "i64",
    "i32",
    "i16",
    "isize",
    "i128",
    "u128",
    "f64",
    "f32",
    "Duration",
    "NonZeroUsize",
    "NonZeroU32",
    "NonZeroU64",
];

/// What is read of this folder beside the crates.
const PYTHON: &str = "python/ionian_container";

#[derive(Debug, Default)]
pub(super) struct Code {
    /// By `crate/file.rs::NAME`, and `crate/file.rs::Type.field` for what a `Default` says.
    pub constants: BTreeMap<String, Constant>,
    /// Tests by name, with their file.
    pub tests: BTreeMap<String, String>,
    /// Settings of the operator, as `section.key`.
    pub settings: BTreeSet<String>,
    /// Places where a number should have a name.
    pub nameless: Vec<String>,
}

#[derive(Debug)]
pub(super) struct Constant {
    pub value_of: Value,
    /// The value as the messages of the check print it.
    pub value: String,
    /// What stands above it in the code.
    pub comment: String,
}

impl Code {
    pub(super) fn read(root: &Path) -> Result<Self> {
        let mut code = Self::default();
        let mut files = Vec::new();
        for folder in ["crates", "xtask", "python", "e2e"] {
            collect(&root.join(folder), &mut files)?;
        }
        files.sort();
        let texts: Vec<(String, String)> = files
            .iter()
            .map(|path| {
                let text =
                    std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
                let name = path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned();
                Ok((name, text))
            })
            .collect::<Result<_>>()?;
        for (name, text) in &texts {
            if has_extension(name, "py") {
                code.read_python(name, text);
            } else {
                code.read_rust(name, text)
                    .with_context(|| format!("failed to parse {name}"))?;
            }
        }
        // Once more for constants that are made of those of other files.
        let known: Known = code
            .constants
            .iter()
            .filter_map(|(key, constant)| Some((key.rsplit_once("::")?.1.to_owned(), constant.value_of.clone())))
            .collect();
        for constant in code.constants.values_mut() {
            if let Value::Text(text) = &constant.value_of
                && let Ok(expr) = syn::parse_str::<Expr>(text)
            {
                constant.value_of = Value::of(&expr, &known);
            }
        }
        Ok(code)
    }

    pub(super) fn read_rust(&mut self, name: &str, text: &str) -> Result<()> {
        let file = syn::parse_file(text)?;
        // `crates/api/src/client/calls.rs` is `api/client/calls.rs` in the table.
        let short = name.strip_prefix("crates/").unwrap_or(name).replacen("/src/", "/", 1);
        let is_product = name.starts_with("crates/") && name.contains("/src/") && !is_test_file(name);
        let mut reader = Reader {
            code: self,
            name,
            short: &short,
            text,
            lines: text.lines().collect(),
            known: Known::new(),
            is_product,
            named: 0,
        };
        reader.visit_file(&file);
        Ok(())
    }

    /// Constants of modules are lines of the form `NAME = 20.0`.
    fn read_python(&mut self, name: &str, text: &str) {
        let mut above = Vec::new();
        for line in text.lines() {
            if let Some(test) = ["def ", "async def "]
                .iter()
                .find_map(|start| line.trim_start().strip_prefix(start))
                .and_then(|rest| rest.split('(').next())
                && test.starts_with("test_")
            {
                self.tests.insert(test.to_owned(), name.to_owned());
            }
            if let Some(comment) = line.strip_prefix('#') {
                above.push(comment.trim().to_owned());
                continue;
            }
            let comment = std::mem::take(&mut above).join(" ");
            if !name.starts_with(PYTHON) {
                continue;
            }
            if let Some((constant, value)) = line.split_once(" = ")
                && constant
                    .chars()
                    .all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
                && !constant.trim_matches('_').is_empty()
                && let Ok(expr) = syn::parse_str::<Expr>(value.split('#').next().unwrap_or(value).trim())
            {
                let value = Value::of(&expr, &Known::new());
                if !matches!(value, Value::Text(_)) {
                    let key = format!("{}::{constant}", name.trim_start_matches("python/"));
                    self.add(key, value, comment);
                }
            }
        }
    }

    fn add(&mut self, key: String, value_of: Value, comment: String) {
        let unit = Unit::of_name(&key);
        let value = value_of.printed(unit);
        self.constants.insert(
            key,
            Constant {
                value_of,
                value,
                comment,
            },
        );
    }
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("failed to list {}", folder.display()))?;
    for entry in entries {
        let path = entry
            .with_context(|| format!("failed to list {}", folder.display()))?
            .path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_symlink() || name.starts_with('.') || name == "target" || name == "node_modules" {
            continue;
        }
        if path.is_dir() {
            collect(&path, files)?;
        } else if has_extension(&name, "rs") || has_extension(&name, "py") {
            files.push(path);
        }
    }
    Ok(())
}

fn has_extension(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|found| found == extension)
}

fn is_test_file(name: &str) -> bool {
    name.contains("/tests/") || name.ends_with("tests.rs")
}

struct Reader<'a> {
    code: &'a mut Code,
    name: &'a str,
    short: &'a str,
    text: &'a str,
    lines: Vec<&'a str>,
    /// Constants of this file so far.
    known: Known,
    is_product: bool,
    /// How many definitions with a name this place stands in.
    named: usize,
}

impl Reader<'_> {
    fn constant(&mut self, name: &str, ty: &Type, expr: &Expr, line: usize) {
        if !self.is_product || !is_number(ty) {
            return;
        }
        let value = Value::of(expr, &self.known);
        self.known.insert(name.to_owned(), value.clone());
        let comment = self.comment_above(line);
        self.code.add(format!("{}::{name}", self.short), value, comment);
    }

    /// The comment that ends right above a line; attributes may stand between.
    fn comment_above(&self, line: usize) -> String {
        let mut found = Vec::new();
        for text in self.lines[..line.saturating_sub(1)].iter().rev() {
            let text = text.trim();
            if let Some(comment) = text.strip_prefix("//") {
                found.push(comment.trim_start_matches('/').trim());
            } else if !text.starts_with("#[") {
                break;
            }
        }
        found.reverse();
        found.join(" ")
    }

    fn nameless(&mut self, what: &str, line: usize) {
        if self.is_product && self.named == 0 {
            self.code.nameless.push(format!("{what} in {}:{line}", self.name));
        }
    }

    fn note_test(&mut self, attributes: &[Attribute], name: &syn::Ident) {
        let is_test = |attribute: &Attribute| {
            attribute
                .path()
                .segments
                .last()
                .is_some_and(|segment| segment.ident == "test")
        };
        if attributes.iter().any(is_test) {
            self.code.tests.insert(name.to_string(), self.name.to_owned());
        }
    }
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        let was = self.is_product;
        self.is_product &= !is_for_tests(&module.attrs);
        visit::visit_item_mod(self, module);
        self.is_product = was;
    }

    fn visit_item_const(&mut self, item: &'ast syn::ItemConst) {
        if !is_for_tests(&item.attrs) {
            self.constant(
                &item.ident.to_string(),
                &item.ty,
                &item.expr,
                item.ident.span().start().line,
            );
        }
        self.named += 1;
        visit::visit_item_const(self, item);
        self.named -= 1;
    }

    fn visit_impl_item_const(&mut self, item: &'ast syn::ImplItemConst) {
        if !is_for_tests(&item.attrs) {
            self.constant(
                &item.ident.to_string(),
                &item.ty,
                &item.expr,
                item.ident.span().start().line,
            );
        }
        self.named += 1;
        visit::visit_impl_item_const(self, item);
        self.named -= 1;
    }

    fn visit_item_fn(&mut self, item: &'ast ItemFn) {
        self.note_test(&item.attrs, &item.sig.ident);
        let was = self.is_product;
        self.is_product &= !is_for_tests(&item.attrs);
        visit::visit_item_fn(self, item);
        self.is_product = was;
    }

    fn visit_impl_item_fn(&mut self, item: &'ast ImplItemFn) {
        let was = self.is_product;
        self.is_product &= !is_for_tests(&item.attrs);
        visit::visit_impl_item_fn(self, item);
        self.is_product = was;
    }

    /// The fields of what a `Default` returns are limits with a name, too.
    fn visit_item_impl(&mut self, item: &'ast ItemImpl) {
        let is_default = item.trait_.as_ref().is_some_and(|(path, _)| path.is_ident("Default"));
        if let (true, Type::Path(of)) = (is_default && self.is_product, &*item.self_ty)
            && let Some(of) = of.path.segments.last()
        {
            let mut fields = Fields {
                of: of.ident.to_string(),
                found: Vec::new(),
                known: &self.known,
            };
            fields.visit_item_impl(item);
            for (name, value, line) in fields.found {
                let comment = self.comment_above(line);
                self.code.add(format!("{}::{name}", self.short), value, comment);
            }
            self.named += 1;
            visit::visit_item_impl(self, item);
            self.named -= 1;
        } else {
            visit::visit_item_impl(self, item);
        }
    }

    fn visit_expr_call(&mut self, call: &'ast ExprCall) {
        let line = call.span().start().line;
        if let Expr::Path(function) = &*call.func
            && let Some(last) = function.path.segments.last()
        {
            let name = last.ident.to_string();
            let argument = call.args.first();
            let is_literal = argument.is_some_and(is_counted);
            match name.as_str() {
                "unbounded_channel" => self.nameless("the size of an unbounded channel", line),
                // `watch::channel(0)` holds a value, and its type is no queue.
                "channel" if is_literal && !function.path.segments.iter().any(|part| part.ident == "watch") => {
                    self.nameless("the size of a channel", line);
                }
                "new" if is_literal && function.path.segments.iter().any(|part| part.ident == "Semaphore") => {
                    self.nameless("the size of a semaphore", line);
                }
                "setting" if self.name.ends_with("server/src/settings.rs") => {
                    if let (Some(section), Some(key)) = (text_of(call.args.get(0)), text_of(call.args.get(1))) {
                        self.code.settings.insert(format!("{section}.{key}"));
                    }
                }
                _ if is_literal && duration_unit(&call.func).is_some() => self.nameless("a duration", line),
                _ => {}
            }
        }
        visit::visit_expr_call(self, call);
    }

    /// Tests inside `proptest!` have names as well.
    fn visit_macro(&mut self, of: &'ast syn::Macro) {
        if of.path.segments.last().is_some_and(|last| last.ident == "proptest") {
            let range = of.span();
            let (start, end) = (range.start().line, range.end().line);
            let lines: Vec<&str> = self.text.lines().skip(start).take(end.saturating_sub(start)).collect();
            for line in lines {
                if let Some(name) = line.trim().strip_prefix("fn ").and_then(|rest| rest.split('(').next()) {
                    self.code.tests.insert(name.to_owned(), self.name.to_owned());
                }
            }
        }
        visit::visit_macro(self, of);
    }
}

/// Collects the numbers among the fields of every struct expression in an `impl Default`.
struct Fields<'a> {
    of: String,
    found: Vec<(String, Value, usize)>,
    known: &'a Known,
}

impl<'ast> Visit<'ast> for Fields<'_> {
    fn visit_expr_struct(&mut self, item: &'ast ExprStruct) {
        let of = match item.path.segments.last() {
            Some(last) if last.ident != "Self" => last.ident.to_string(),
            _ => self.of.clone(),
        };
        for field in &item.fields {
            let syn::Member::Named(name) = &field.member else {
                continue;
            };
            let expr = match &field.expr {
                Expr::Call(call) if matches!(&*call.func, Expr::Path(path) if path.path.is_ident("Some")) => {
                    call.args.first().unwrap_or(&field.expr)
                }
                expr => expr,
            };
            // A constant of its own is listed under its own name.
            if matches!(expr, Expr::Path(_)) {
                continue;
            }
            let value = Value::of(expr, self.known);
            if !matches!(value, Value::Text(_)) {
                self.found
                    .push((format!("{of}.{name}"), value, name.span().start().line));
            }
        }
        visit::visit_expr_struct(self, item);
    }
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) => list.path.is_ident("cfg") && list.tokens.to_string().trim() == "test",
        Meta::Path(path) => path.segments.last().is_some_and(|last| last.ident == "test"),
        Meta::NameValue(_) => false,
    })
}

fn is_number(ty: &Type) -> bool {
    match ty {
        Type::Path(path) => path
            .path
            .segments
            .last()
            .is_some_and(|last| NUMBERS.iter().any(|number| last.ident == number)),
        Type::Tuple(tuple) => !tuple.elems.is_empty() && tuple.elems.iter().all(is_number),
        _ => false,
    }
}

/// Whether an argument is a number as it stands, and not zero.
fn is_counted(expr: &Expr) -> bool {
    match Value::of(expr, &Known::new()) {
        Value::Number(number) => number != 0,
        Value::Fraction(number) => number != 0.0,
        Value::Duration(_) | Value::Text(_) => false,
    }
}

fn text_of(expr: Option<&Expr>) -> Option<String> {
    match expr? {
        Expr::Lit(ExprLit {
            lit: Lit::Str(text), ..
        }) => Some(text.value()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Code {
        let mut code = Code::default();
        code.read_rust("crates/one/src/two/three.rs", text).unwrap();
        code
    }

    #[test]
    fn constants_and_fields_of_defaults_are_found() {
        let code = read(
            "/// Some\n/// words.\npub(crate) const QUEUE: usize = 4 * 1024;\n\
             const TEXT: &str = \"no number\";\n\
             fn f() { const INNER: Duration = Duration::from_secs(3); }\n\
             impl Default for Limits { fn default() -> Self { Self { wait: Duration::from_secs(1), queue: QUEUE, \
             name: String::new(), retries: Some(3) } } }\n\
             #[cfg(test)] mod tests { const NOT: usize = 1; }\n",
        );
        let found: Vec<(&str, &str)> = code
            .constants
            .iter()
            .map(|(key, constant)| (key.as_str(), constant.value.as_str()))
            .collect();
        assert_eq!(
            found,
            [
                ("one/two/three.rs::INNER", "3 s"),
                ("one/two/three.rs::Limits.retries", "3"),
                ("one/two/three.rs::Limits.wait", "1 s"),
                ("one/two/three.rs::QUEUE", "4,096"),
            ]
        );
        assert_eq!(code.constants["one/two/three.rs::QUEUE"].comment, "Some words.");
        assert!(code.nameless.is_empty(), "{:?}", code.nameless);
    }

    #[test]
    fn tests_have_names() {
        let code =
            read("#[tokio::test]\nasync fn one_shows_it() {}\nproptest! {\n    fn two_shows_it(a in 0..3) {}\n}\n");
        let names: Vec<&String> = code.tests.keys().collect();
        assert_eq!(names, ["one_shows_it", "two_shows_it"]);
    }

    #[test]
    fn python_modules_have_constants_and_tests() {
        let mut code = Code::default();
        let text = "# Why so long.\nDRAIN_SECONDS = 20.0\nNAME = \"text\"\nasync def test_it():\n    pass\n";
        code.read_python("python/ionian_container/hook.py", text);
        let constant = &code.constants["ionian_container/hook.py::DRAIN_SECONDS"];
        assert_eq!(
            (constant.value.as_str(), constant.comment.as_str()),
            ("20 s", "Why so long.")
        );
        assert_eq!(code.constants.len(), 1);
        assert!(code.tests.contains_key("test_it"));
    }
}
