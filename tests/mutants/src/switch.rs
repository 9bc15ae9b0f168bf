//! Writes mutants into source, each behind a switch.

use crate::{Mutant, Place};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// How the text of a place is switched. Ranges are of bytes of the source.
enum Kind {
    /// `a op b`, each evaluated once.
    Values(Range<usize>, String, Range<usize>),
    /// `a < b` and its like, which take their sides by reference.
    Compared(Range<usize>, String, Range<usize>),
    /// `a && b` or `a || b`; whether it is and.
    Lazy(Range<usize>, bool, Range<usize>),
    /// `a op= b`.
    Assigned(Range<usize>, String, Range<usize>),
    /// `!a` or `-a`.
    Unary(String, Range<usize>),
    /// A function's body, which returns early.
    Body,
    /// A match arm's guard, and the place after a pattern where there is none.
    Guard,
}

impl Kind {
    /// Which of two is the outer one where both have the same range.
    fn depth(&self) -> u8 {
        match self {
            Kind::Body => 0,
            Kind::Guard => 1,
            _ => 2,
        }
    }
}

struct Node {
    range: Range<usize>,
    kind: Kind,
    /// The mutants of this place: id, replacement, whether it is the arm that is deleted.
    variants: Vec<(usize, String, bool)>,
}

/// The source with these mutants in it, and those that have no place there. `root` is the
/// path of the crate with the switch.
pub fn file(
    source: &str,
    mutants: &[Mutant],
    wanted: &[usize],
    root: &str,
) -> (String, Vec<usize>) {
    let starts: Vec<usize> = std::iter::once(0)
        .chain(source.match_indices('\n').map(|(i, _)| i + 1))
        .collect();
    let offset = |place: Place| {
        let line = starts[place.line - 1];
        let chars = source[line..].char_indices().nth(place.column - 1);
        line + chars.map_or(0, |(i, _)| i)
    };
    let mut finder = Finder::default();
    let parsed = syn::parse_file(source).expect("source that parses");
    finder.visit_file(&parsed);
    let mut nodes: Vec<Node> = Vec::new();
    let mut left = Vec::new();
    let mut by_place: BTreeMap<(usize, usize, u8), usize> = BTreeMap::new();
    for &id in wanted {
        let mutant = &mutants[id];
        let (start, end) = (offset(mutant.span.start), offset(mutant.span.end));
        let found = match mutant.genre.as_str() {
            "FnValue" => Some((start..end, Kind::Body)),
            "MatchArmGuard" => Some((start..end, Kind::Guard)),
            "MatchArm" => finder
                .arms
                .get(&start)
                .map(|range| (range.clone(), Kind::Guard)),
            "BinaryOperator" => finder.binary(start),
            "UnaryOperator" => finder
                .unary
                .get(&start)
                .map(|(op, a)| (start..a.end, Kind::Unary(op.clone(), a.clone()))),
            _ => None,
        };
        let Some((range, kind)) = found else {
            left.push(id);
            continue;
        };
        let at = *by_place
            .entry((range.start, range.end, kind.depth()))
            .or_insert_with(|| {
                nodes.push(Node {
                    range,
                    kind,
                    variants: Vec::new(),
                });
                nodes.len() - 1
            });
        nodes[at]
            .variants
            .push((id, mutant.replacement.clone(), mutant.genre == "MatchArm"));
    }
    // Outer places before inner ones.
    nodes.sort_by_key(|n| {
        (
            n.range.start,
            std::cmp::Reverse(n.range.end),
            n.kind.depth(),
        )
    });
    let writer = Writer {
        source,
        nodes: &nodes,
        root,
    };
    (writer.text(0..source.len(), 0), left)
}

/// The mutants whose text is at this byte of switched source, of the innermost place.
pub fn innermost(text: &str, at: usize) -> BTreeSet<usize> {
    let mut open: Vec<&str> = Vec::new();
    for (start, _) in text
        .match_indices("/*<")
        .chain(text.match_indices("/*>"))
        .collect::<BTreeMap<_, _>>()
    {
        if start > at {
            break;
        }
        if text[start..].starts_with("/*>") {
            open.pop();
        } else {
            let rest = &text[start + 3..];
            open.push(&rest[..rest.find("*/").expect("a closed mark")]);
        }
    }
    let ids = open.last().copied().unwrap_or("");
    ids.split(',').filter_map(|id| id.parse().ok()).collect()
}

/// Where operators, arms and guards stand.
#[derive(Default)]
struct Finder {
    /// By the operator's place: whole, left, operator, right.
    binaries: BTreeMap<usize, (Range<usize>, Range<usize>, String, Range<usize>)>,
    /// By the operator's place: the operator, what it is of.
    unary: BTreeMap<usize, (String, Range<usize>)>,
    /// By an arm's place: its guard, or where one would stand.
    arms: BTreeMap<usize, Range<usize>>,
}

impl Finder {
    fn binary(&self, at: usize) -> Option<(Range<usize>, Kind)> {
        let (whole, a, op, b) = self.binaries.get(&at)?.clone();
        let kind = match op.as_str() {
            "&&" | "||" => Kind::Lazy(a, op == "&&", b),
            "==" | "!=" | "<" | ">" | "<=" | ">=" => Kind::Compared(a, op, b),
            _ if op.ends_with('=') => Kind::Assigned(a, op, b),
            _ => Kind::Values(a, op, b),
        };
        Some((whole, kind))
    }
}

fn range(node: &impl Spanned) -> Range<usize> {
    node.span().byte_range()
}

/// Whether an operand binds names for what comes after it.
fn has_let(expr: &syn::Expr) -> bool {
    match expr {
        syn::Expr::Let(_) => true,
        syn::Expr::Binary(e) if matches!(e.op, syn::BinOp::And(_)) => {
            has_let(&e.left) || has_let(&e.right)
        }
        _ => false,
    }
}

impl<'a> Visit<'a> for Finder {
    fn visit_expr_binary(&mut self, e: &'a syn::ExprBinary) {
        if !has_let(&e.left) && !has_let(&e.right) {
            let (a, b) = (range(&e.left), range(&e.right));
            let op = e.op.span().source_text().unwrap_or_default();
            self.binaries
                .insert(range(&e.op).start, (a.start..b.end, a, op, b));
        }
        visit::visit_expr_binary(self, e);
    }

    fn visit_expr_unary(&mut self, e: &'a syn::ExprUnary) {
        let op = e.op.span().source_text().unwrap_or_default();
        self.unary.insert(range(&e.op).start, (op, range(&e.expr)));
        visit::visit_expr_unary(self, e);
    }

    fn visit_arm(&mut self, arm: &'a syn::Arm) {
        let end = range(&arm.pat).end;
        let guard = arm
            .guard
            .as_ref()
            .map_or(end..end, |(_, guard)| range(guard));
        self.arms.insert(range(arm).start, guard);
        visit::visit_arm(self, arm);
    }
}

struct Writer<'a> {
    source: &'a str,
    nodes: &'a [Node],
    root: &'a str,
}

impl Writer<'_> {
    fn on(&self, id: usize) -> String {
        format!("{}::mutants::on({id})", self.root)
    }

    /// The source of a range with what is switched in it; of the nodes, those from `from`.
    fn text(&self, range: Range<usize>, from: usize) -> String {
        let mut text = String::new();
        let mut at = range.start;
        for (i, node) in self.nodes.iter().enumerate().skip(from) {
            if node.range.start < at || node.range.end > range.end {
                continue;
            }
            text += &self.source[at..node.range.start];
            text += &self.node(i);
            at = node.range.end;
        }
        text + &self.source[at..range.end]
    }

    fn node(&self, i: usize) -> String {
        let Node {
            range,
            kind,
            variants,
        } = &self.nodes[i];
        let inner = |range: &Range<usize>| self.text(range.clone(), i + 1);
        // `if` chains: one branch a mutant, and what stood there last.
        let branches = |of: &dyn Fn(&str) -> String, usual: &str| {
            let each = variants.iter().map(|(id, new, _)| {
                format!(
                    "if {} {{ /*<{id}*/ {} /*>*/ }} else ",
                    self.on(*id),
                    of(new)
                )
            });
            format!("{}{{ {} }}", each.collect::<String>(), of(usual))
        };
        let text = match kind {
            Kind::Values(a, op, b) => {
                let of = |op: &str| format!("l {op} r");
                format!(
                    "(match ({}, {}) {{ (l, r) => {} }})",
                    inner(a),
                    inner(b),
                    branches(&of, op)
                )
            }
            Kind::Compared(a, op, b) => {
                let of = |op: &str| format!("*l {op} *r");
                format!(
                    "(match (&({}), &({})) {{ (l, r) => {} }})",
                    inner(a),
                    inner(b),
                    branches(&of, op)
                )
            }
            Kind::Lazy(a, and, b) => {
                let (id, not) = (self.on(variants[0].0), if *and { "!=" } else { "==" });
                format!(
                    "({{ let l: bool = {}; if l {not} {id} {{ {} }} else {{ l }} }})",
                    inner(a),
                    inner(b)
                )
            }
            Kind::Assigned(a, op, b) => {
                let a = inner(a);
                let of = |op: &str| format!("{a} {op} r");
                format!("(match {} {{ r => {} }})", inner(b), branches(&of, op))
            }
            Kind::Unary(op, a) => {
                let of = |op: &str| format!("{op}v");
                format!("({{ let v = {}; {} }})", inner(a), branches(&of, op))
            }
            Kind::Body => {
                let each = variants.iter().map(|(id, new, _)| {
                    format!("if {} {{ /*<{id}*/ return {new}; /*>*/ }} ", self.on(*id))
                });
                each.collect::<String>() + &inner(range)
            }
            Kind::Guard => {
                let mut guard = if range.is_empty() {
                    "true".to_string()
                } else {
                    format!("({})", inner(range))
                };
                for (id, new, deleted) in variants {
                    let on = self.on(*id);
                    guard = if *deleted || new == "false" {
                        format!("(!{on} && {guard})")
                    } else {
                        format!("({on} || {guard})")
                    };
                }
                if range.is_empty() {
                    format!(" if {guard}")
                } else {
                    guard
                }
            }
        };
        let ids: Vec<String> = variants.iter().map(|(id, ..)| id.to_string()).collect();
        format!("/*<{}*/{text}/*>*/", ids.join(","))
    }
}
