//! A YAML text that is edited where it stands: what no edit touches stays as it was written,
//! comments, quotes, order and `${…}` included.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use saphyr_parser::{Event, Parser, Span};

/// How deep lists and maps may be in each other. Compose's own need about ten.
const MAX_DEPTH: usize = 64;

/// Why a text cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is not YAML, or YAML of a kind that no compose file is.
    #[error("line {line}: {reason}")]
    Text {
        /// From 1.
        line: usize,
        /// Without any value of the file, which may be a secret.
        reason: String,
    },
    /// There is nothing in it.
    #[error("there is nothing in it")]
    Empty,
}

/// The number of a node in its document.
pub type NodeId = usize;

/// A text, and what stands where in it.
pub struct Document {
    text: String,
    /// The byte at which each line begins, and the text's length.
    lines: Vec<usize>,
    nodes: Vec<Node>,
    /// What aliases stand for, by the parser's numbers.
    anchors: HashMap<usize, NodeId>,
    root: NodeId,
}

struct Node {
    kind: Kind,
    /// In bytes; of a block list or map only its beginning is known.
    span: Range<usize>,
    anchor: usize,
    flow: bool,
}

enum Kind {
    Scalar(String),
    List(Vec<Item>),
    Map(Vec<Item>),
    Alias(usize),
}

/// An item of a list, whose key is empty, or an entry of a map.
struct Item {
    key: String,
    /// Its column, in characters.
    column: usize,
    /// The lines that it takes in a block, its own comments included.
    lines: Range<usize>,
    value: NodeId,
}

impl Document {
    /// Reads a text of one YAML document.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let lines = std::iter::once(0)
            .chain(text.match_indices('\n').map(|(at, _)| at + 1))
            .filter(|at| *at < text.len())
            .chain([text.len()])
            .collect();
        let mut document = Document {
            text: text.to_owned(),
            lines,
            nodes: Vec::new(),
            anchors: HashMap::new(),
            root: 0,
        };
        let mut events = Parser::new_from_str(text);
        let mut root = None;
        let mut end = document.lines.len() - 1;
        while let Some(event) = events.next_event() {
            match event.map_err(scan_error)? {
                (Event::DocumentStart(_), span) if root.is_some() => {
                    return Err(error_at(
                        span,
                        "a second YAML document begins; give them one at a time",
                    ));
                }
                (Event::DocumentEnd, span) => {
                    let line = span.start.line().saturating_sub(1);
                    if document.line(line).starts_with("...") {
                        end = line;
                    }
                }
                (
                    Event::Nothing
                    | Event::StreamStart
                    | Event::StreamEnd
                    | Event::DocumentStart(_),
                    _,
                ) => {}
                (event, span) => root = Some(document.read(&mut events, event, span, 0)?),
            }
        }
        document.root = root.ok_or(Error::Empty)?;
        document.measure(document.root, end);
        Ok(document)
    }

    /// The node that the whole document is.
    pub fn root(&self) -> NodeId {
        self.root
    }

    /// The node that `id` is or stands for.
    pub fn resolve(&self, id: NodeId) -> NodeId {
        match self.nodes[id].kind {
            // Never an alias to an alias: only what is written out has an anchor.
            Kind::Alias(anchor) => self.anchors.get(&anchor).copied().unwrap_or(id),
            _ => id,
        }
    }

    /// A scalar's value.
    pub fn scalar(&self, id: NodeId) -> Option<&str> {
        match &self.nodes[self.resolve(id)].kind {
            Kind::Scalar(text) => Some(text),
            _ => None,
        }
    }

    /// Whether there is nothing: no value, or an empty list or map.
    pub fn is_empty(&self, id: NodeId) -> bool {
        let node = &self.nodes[self.resolve(id)];
        match &node.kind {
            Kind::Scalar(_) => matches!(self.source(node), "" | "~" | "null"),
            Kind::List(items) | Kind::Map(items) => items.is_empty(),
            Kind::Alias(_) => true,
        }
    }

    /// Whether it is a map, or an alias of one.
    pub fn is_map(&self, id: NodeId) -> bool {
        matches!(self.nodes[self.resolve(id)].kind, Kind::Map(_))
    }

    /// The items of a list; none of anything else.
    pub fn items(&self, id: NodeId) -> Vec<NodeId> {
        match &self.nodes[self.resolve(id)].kind {
            Kind::List(items) => items.iter().map(|item| item.value).collect(),
            _ => Vec::new(),
        }
    }

    /// The entries that stand in a map itself; none of anything else.
    pub fn own_entries(&self, id: NodeId) -> Vec<(&str, NodeId)> {
        match &self.nodes[self.resolve(id)].kind {
            Kind::Map(items) => items
                .iter()
                .map(|item| (item.key.as_str(), item.value))
                .collect(),
            _ => Vec::new(),
        }
    }

    /// The entries of a map, those that `<<` brings included.
    pub fn entries(&self, id: NodeId) -> Vec<(&str, NodeId)> {
        let (mut known, mut all) = (HashSet::new(), Vec::new());
        for map in self.layers(id) {
            for (key, value) in self.own_entries(map) {
                if key != "<<" && known.insert(key) {
                    all.push((key, value));
                }
            }
        }
        all
    }

    /// The value of a key of a map, `<<` considered.
    pub fn get(&self, id: NodeId, key: &str) -> Option<NodeId> {
        let (map, index) = self.locate(id, key)?;
        Some(self.own_entries(map)[index].1)
    }

    /// Where a key of a map stands: in which map, and as which of its entries.
    pub fn locate(&self, id: NodeId, key: &str) -> Option<(NodeId, usize)> {
        self.layers(id).into_iter().find_map(|map| {
            let entries = self.own_entries(map);
            let index = entries.iter().position(|(known, _)| *known == key)?;
            Some((map, index))
        })
    }

    /// A map, and after it those that `<<` brings, the weaker the later.
    fn layers(&self, id: NodeId) -> Vec<NodeId> {
        let id = self.resolve(id);
        let mut layers = vec![id];
        for (_, value) in self.own_entries(id).iter().filter(|(key, _)| *key == "<<") {
            let merged = self.resolve(*value);
            if self.is_map(merged) {
                layers.extend(self.layers(merged));
            }
            for item in self.items(merged) {
                layers.extend(self.layers(item));
            }
        }
        layers
    }

    /// Whether it is a list or map on the lines of a block, so that its parts can be edited.
    pub fn is_block(&self, id: NodeId) -> bool {
        let node = &self.nodes[id];
        matches!(node.kind, Kind::List(_) | Kind::Map(_)) && !node.flow
    }

    /// The bytes of the lines of the `index`th part of a block.
    pub fn extent(&self, id: NodeId, index: usize) -> Range<usize> {
        let lines = &self.parts(id)[index].lines;
        self.lines[lines.start]..self.lines[lines.end]
    }

    /// Where the comment lines right above the `index`th part of a block begin.
    pub fn heading(&self, id: NodeId, index: usize) -> usize {
        self.lines[self.heading_line(id, index)]
    }

    /// The bytes to take out for the `index`th part of a block to be gone, with the comments right above it and the
    /// blank lines that would be too many.
    pub fn removal(&self, id: NodeId, index: usize) -> Range<usize> {
        let blank = |line: usize| self.line(line).trim().is_empty();
        let mut start = self.heading_line(id, index);
        let mut end = self.parts(id)[index].lines.end;
        let last = self.lines.len() - 1;
        if start == 0 || blank(start - 1) || self.line(start - 1).ends_with(':') {
            while end < last && blank(end) {
                end += 1;
            }
        }
        if end == last {
            while start > 0 && blank(start - 1) {
                start -= 1;
            }
        }
        self.lines[start]..self.lines[end]
    }

    fn heading_line(&self, id: NodeId, index: usize) -> usize {
        let item = &self.parts(id)[index];
        let mut start = item.lines.start;
        while start > 0 && {
            let above = self.line(start - 1);
            above.trim_start().starts_with('#') && indent(above) == item.column
        } {
            start -= 1;
        }
        start
    }

    /// The column at which the parts of a block begin.
    pub fn column(&self, id: NodeId) -> usize {
        self.parts(id).first().map_or(0, |item| item.column)
    }

    /// Where a further part of a block is to be written, in bytes.
    pub fn end(&self, id: NodeId) -> usize {
        let last = self.parts(id).last();
        last.map_or(self.text.len(), |item| self.lines[item.lines.end])
    }

    /// The lines of a block's part as they stand, moved to another column.
    pub fn moved(&self, id: NodeId, index: usize, column: usize) -> String {
        let was = self.parts(id)[index].column;
        let text = &self.text[self.extent(id, index)];
        text.split_inclusive('\n')
            .map(|line| match line.trim() {
                "" => "\n".to_owned(),
                _ => {
                    let indent = (indent(line) + column).saturating_sub(was);
                    format!(
                        "{:indent$}{}\n",
                        "",
                        line.trim_start().trim_end_matches('\n')
                    )
                }
            })
            .collect()
    }

    /// Whether there are anchors or aliases in a node.
    pub fn has_references(&self, id: NodeId) -> bool {
        let node = &self.nodes[id];
        node.anchor != 0
            || matches!(node.kind, Kind::Alias(_))
            || self
                .parts(id)
                .iter()
                .any(|item| self.has_references(item.value))
    }

    /// Writes a value at the end of a line, `key:` before it, with what aliases stand for.
    /// `column` is that of the key.
    pub fn written(&self, id: NodeId, column: usize) -> String {
        let id = self.resolve(id);
        let node = &self.nodes[id];
        match &node.kind {
            Kind::Scalar(text) => match self.source(node) {
                "" => "\n".into(),
                source if !source.contains('\n') && !source.starts_with(['|', '>']) => {
                    format!(" {source}\n")
                }
                _ => format!(" {}\n", quoted(text)),
            },
            Kind::List(items) if items.is_empty() => " []\n".into(),
            Kind::Map(items) if items.is_empty() => " {}\n".into(),
            Kind::List(items) => {
                let column = column + 2;
                let lines = items.iter().map(|item| {
                    let value = self.written(item.value, column);
                    // A list or map in a list begins on the line of its dash.
                    let value = match value.strip_prefix('\n') {
                        Some(lines) => format!(" {}", lines.trim_start()),
                        None => value,
                    };
                    format!("{:column$}-{value}", "")
                });
                format!("\n{}", lines.collect::<String>())
            }
            Kind::Map(_) => {
                let column = column + 2;
                let lines = self.entries(id).into_iter().map(|(key, value)| {
                    let value = self.written(value, column);
                    format!("{:column$}{}:{value}", "", plain(key))
                });
                format!("\n{}", lines.collect::<String>())
            }
            Kind::Alias(_) => "\n".into(),
        }
    }

    /// The bytes of a value in a flow, or of an alias.
    pub fn span(&self, id: NodeId) -> Range<usize> {
        self.nodes[id].span.clone()
    }

    /// The anchors in `within` that aliases outside of it name: name and node.
    pub fn lost_anchors(&self, within: &[Range<usize>]) -> Vec<(&str, NodeId)> {
        let inside = |at: usize| within.iter().any(|range| range.contains(&at));
        let mut lost: Vec<(&str, NodeId)> = Vec::new();
        for node in &self.nodes {
            let Kind::Alias(anchor) = node.kind else {
                continue;
            };
            let Some(&target) = self.anchors.get(&anchor) else {
                continue;
            };
            let known = lost.iter().any(|(_, other)| *other == target);
            if !known && !inside(node.span.start) && inside(self.nodes[target].span.start) {
                lost.push((&self.text[node.span.start + 1..node.span.end], target));
            }
        }
        lost
    }

    /// The entries of the root that hold an anchor which some alias names.
    pub fn anchor_holders(&self) -> HashSet<&str> {
        let mut names = HashSet::new();
        for (key, value) in self.own_entries(self.root) {
            let inside = self.under(value);
            let named = self.nodes.iter().enumerate().any(|(id, node)| {
                let Kind::Alias(anchor) = node.kind else {
                    return false;
                };
                let target = self.anchors.get(&anchor);
                !inside.contains(&id) && target.is_some_and(|target| inside.contains(target))
            });
            if named {
                names.insert(key);
            }
        }
        names
    }

    /// A node, and all nodes in it.
    pub fn under(&self, id: NodeId) -> HashSet<NodeId> {
        let mut all = HashSet::from([id]);
        for item in self.parts(id) {
            all.extend(self.under(item.value));
        }
        all
    }

    /// The text with edits made: what comes in place of which bytes. None may overlap another.
    pub fn edited(&self, mut edits: Vec<(Range<usize>, String)>) -> String {
        edits.sort_by_key(|(range, _)| (range.start, range.end));
        let (mut text, mut at) = (String::new(), 0);
        for (range, new) in edits {
            text.push_str(&self.text[at..range.start.max(at)]);
            // The last line of a file may have no end.
            if !new.is_empty() && !text.is_empty() && at_line_start(&self.text, range.start) {
                ensure_newline(&mut text);
            }
            text.push_str(&new);
            at = range.end.max(at);
        }
        text.push_str(&self.text[at..]);
        text
    }

    /// A scalar as it is written, without its anchor.
    fn source(&self, node: &Node) -> &str {
        let start = self.behind_anchor(node.span.start).min(node.span.end);
        self.text[start..node.span.end].trim_end()
    }

    /// The byte behind the anchor at `start`, if there is one, and the blanks after it.
    fn behind_anchor(&self, start: usize) -> usize {
        let text = &self.text[start..];
        if !text.starts_with('&') {
            return start;
        }
        let name = text.find(char::is_whitespace).unwrap_or(text.len());
        let blanks = text[name..].len() - text[name..].trim_start_matches(' ').len();
        start + name + blanks
    }

    fn parts(&self, id: NodeId) -> &[Item] {
        match &self.nodes[id].kind {
            Kind::List(items) | Kind::Map(items) => items,
            _ => &[],
        }
    }

    /// A line from 0, without its end; empty where there is none.
    fn line(&self, number: usize) -> &str {
        match (self.lines.get(number), self.lines.get(number + 1)) {
            (Some(&start), Some(&end)) => self.text[start..end].trim_end_matches('\n'),
            _ => "",
        }
    }

    /// Where a marker's character is, in bytes.
    fn byte(&self, line: usize, column: usize) -> usize {
        let Some(&start) = self.lines.get(line.saturating_sub(1)) else {
            return self.text.len();
        };
        let rest = &self.text[start..];
        start
            + rest
                .char_indices()
                .nth(column)
                .map_or(rest.len(), |(at, _)| at)
    }

    fn read<'t>(
        &mut self,
        events: &mut Parser<'t, saphyr_parser::StrInput<'t>>,
        event: Event<'t>,
        span: Span,
        depth: usize,
    ) -> Result<NodeId, Error> {
        if depth > MAX_DEPTH {
            return Err(error_at(
                span,
                "lists and maps are in each other too deeply",
            ));
        }
        let start = self.byte(span.start.line(), span.start.col());
        let mut node = Node {
            kind: Kind::Scalar(String::new()),
            span: start..self.byte(span.end.line(), span.end.col()).max(start),
            anchor: 0,
            flow: self.text[self.behind_anchor(start)..].starts_with(['[', '{']),
        };
        match event {
            Event::Alias(anchor) => {
                if !self.anchors.contains_key(&anchor) {
                    return Err(error_at(span, "an alias stands in what it stands for"));
                }
                node.kind = Kind::Alias(anchor);
            }
            Event::Scalar(text, _, anchor, _) => {
                node.anchor = anchor;
                node.kind = Kind::Scalar(text.into_owned());
            }
            Event::SequenceStart(anchor, _) => {
                node.anchor = anchor;
                let mut items = Vec::new();
                loop {
                    match self.next(events, span)? {
                        (Event::SequenceEnd, end) => {
                            node.span.end = self.byte(end.end.line(), end.end.col());
                            break;
                        }
                        (event, at) => {
                            let value = self.read(events, event, at, depth + 1)?;
                            let line = at.start.line().saturating_sub(1);
                            items.push(Item {
                                key: String::new(),
                                // Of the dash.
                                column: indent(self.line(line)),
                                lines: line..0,
                                value,
                            });
                        }
                    }
                }
                node.kind = Kind::List(items);
            }
            Event::MappingStart(anchor, _) => {
                node.anchor = anchor;
                let mut items = Vec::new();
                loop {
                    match self.next(events, span)? {
                        (Event::MappingEnd, end) => {
                            node.span.end = self.byte(end.end.line(), end.end.col());
                            break;
                        }
                        (Event::Scalar(key, ..), at) => {
                            let (event, of_value) = self.next(events, at)?;
                            let value = self.read(events, event, of_value, depth + 1)?;
                            items.push(Item {
                                key: key.into_owned(),
                                column: at.start.col(),
                                lines: at.start.line().saturating_sub(1)..0,
                                value,
                            });
                        }
                        (_, at) => return Err(error_at(at, "this key is not a text")),
                    }
                }
                node.kind = Kind::Map(items);
            }
            _ => return Err(error_at(span, "the file ends in the middle")),
        }
        node.span.end = node.span.end.max(start);
        let (id, anchor) = (self.nodes.len(), node.anchor);
        self.nodes.push(node);
        if anchor != 0 {
            self.anchors.insert(anchor, id);
        }
        Ok(id)
    }

    fn next<'t>(
        &self,
        events: &mut Parser<'t, saphyr_parser::StrInput<'t>>,
        before: Span,
    ) -> Result<(Event<'t>, Span), Error> {
        match events.next_event() {
            Some(event) => event.map_err(scan_error),
            None => Err(error_at(before, "the file ends in the middle")),
        }
    }

    /// Finds the lines that each part of the block `id`, which ends before the line `end`, takes.
    fn measure(&mut self, id: NodeId, end: usize) {
        if !self.is_block(id) {
            return;
        }
        let starts: Vec<usize> = self.parts(id).iter().map(|item| item.lines.start).collect();
        for (index, &start) in starts.iter().enumerate() {
            let column = self.parts(id)[index].column;
            let bound = starts.get(index + 1).copied().unwrap_or(end).max(start);
            // Blank lines, and comments no deeper than it, belong to what follows.
            let mut last = bound.max(start + 1).min(self.lines.len() - 1);
            while last > start + 1 && {
                let line = self.line(last - 1);
                let text = line.trim_start();
                text.is_empty() || text.starts_with('#') && indent(line) <= column
            } {
                last -= 1;
            }
            let value = {
                let (Kind::List(items) | Kind::Map(items)) = &mut self.nodes[id].kind else {
                    return;
                };
                items[index].lines.end = last;
                items[index].value
            };
            self.measure(value, last);
        }
    }
}

/// A value for a line of a map: as it is where YAML takes that for a text, else in quotes.
pub fn plain(text: &str) -> String {
    let word = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c));
    let other = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"]
        .contains(&text.to_ascii_lowercase().as_str());
    match word && !other {
        true => text.to_owned(),
        false => quoted(text),
    }
}

/// In double quotes, on one line.
pub fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn indent(line: &str) -> usize {
    line.chars().take_while(|c| *c == ' ').count()
}

fn at_line_start(text: &str, at: usize) -> bool {
    at == text.len() || text[..at].ends_with('\n')
}

fn ensure_newline(text: &mut String) {
    if !text.ends_with('\n') {
        text.push('\n');
    }
}

fn error_at(span: Span, reason: &str) -> Error {
    Error::Text {
        line: span.start.line(),
        reason: reason.to_owned(),
    }
}

fn scan_error(error: saphyr_parser::ScanError) -> Error {
    Error::Text {
        line: error.marker().line(),
        reason: format!("this is no YAML: {}", error.info()),
    }
}
