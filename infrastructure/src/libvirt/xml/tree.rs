//! A small XML tree between libvirt's documents and our types.
//!
//! Writing goes through quick-xml's writer, which escapes every name and value, so that no string
//! can become markup. Reading is bounded in size, depth and number of elements, knows the five
//! predefined entities only, and refuses document types: what libvirt hands out may have been
//! edited by anybody.

use std::borrow::Cow;

use ghost_domain::{Error, ErrorCode, Result};
use quick_xml::XmlVersion;
use quick_xml::events::{BytesEnd, BytesStart, BytesText, Event};
use quick_xml::name::{Namespace, ResolveResult};
use quick_xml::reader::NsReader;
use quick_xml::writer::Writer;

/// Largest document that is read, bytes. libvirt's own documents are a few KiB.
const MAX_BYTES: usize = 4 << 20;
/// Deepest nesting that is read.
const MAX_DEPTH: usize = 64;
/// Most elements that are read.
const MAX_ELEMENTS: usize = 20_000;

/// An element with its attributes, text and children, in document order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Element {
    /// Name without prefix.
    pub(crate) name: String,
    /// Namespace, empty for none.
    pub(crate) namespace: String,
    /// Attributes without namespace declarations, names as written.
    pub(crate) attributes: Vec<(String, String)>,
    /// All text directly inside, joined; surrounding white space removed where it was read.
    pub(crate) text: String,
    /// Children.
    pub(crate) children: Vec<Element>,
}

impl Element {
    /// An empty element without a namespace.
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::default()
        }
    }

    /// An empty element in a namespace.
    pub(crate) fn in_namespace(namespace: &str, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            ..Self::default()
        }
    }

    /// Adds an attribute.
    #[must_use]
    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.attributes.push((name.to_owned(), value.into()));
        self
    }

    /// Sets the text.
    #[must_use]
    pub(crate) fn text(mut self, text: impl Into<String>) -> Self {
        self.text = text.into();
        self
    }

    /// Adds a child.
    #[must_use]
    pub(crate) fn child(mut self, child: Self) -> Self {
        self.children.push(child);
        self
    }

    /// Adds children.
    #[must_use]
    pub(crate) fn children(mut self, children: impl IntoIterator<Item = Self>) -> Self {
        self.children.extend(children);
        self
    }

    /// Puts the element and all below it into another namespace, or, with an empty one, into none.
    pub(crate) fn set_namespace(&mut self, namespace: &str) {
        namespace.clone_into(&mut self.namespace);
        for child in &mut self.children {
            child.set_namespace(namespace);
        }
    }

    /// An attribute's value.
    pub(crate) fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    /// The first child without a namespace and with this name.
    pub(crate) fn find(&self, name: &str) -> Option<&Self> {
        self.children
            .iter()
            .find(|child| child.name == name && child.namespace.is_empty())
    }

    /// Follows a path of child names.
    pub(crate) fn at(&self, path: &[&str]) -> Option<&Self> {
        path.iter().try_fold(self, |here, name| here.find(name))
    }

    /// All children without a namespace and with this name.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Self> {
        self.all_in("", name)
    }

    /// All children of a namespace with this name.
    pub(crate) fn all_in<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> impl Iterator<Item = &'a Self> {
        self.children
            .iter()
            .filter(move |child| child.name == name && child.namespace == namespace)
    }

    /// How many elements this one and all below it are.
    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        1 + self.children.iter().map(Self::count).sum::<usize>()
    }

    /// Writes the document. Elements of a namespace get the prefix `ghost`, declared where the
    /// namespace begins.
    ///
    /// # Errors
    /// `InvalidArgument` when a value holds a character that XML 1.0 cannot carry at all.
    pub(crate) fn to_xml(&self) -> Result<String> {
        let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
        self.write(&mut writer, "")?;
        String::from_utf8(writer.into_inner())
            .map_err(|error| Error::internal("the XML writer made invalid UTF-8").because(error))
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>, outer_namespace: &str) -> Result<()> {
        let failed =
            |error: std::io::Error| Error::internal("cannot write XML to memory").because(error);
        let name = if self.namespace.is_empty() {
            Cow::Borrowed(self.name.as_str())
        } else {
            Cow::Owned(format!("{PREFIX}:{}", self.name))
        };
        let mut start = BytesStart::new(name.as_ref());
        if !self.namespace.is_empty() && self.namespace != outer_namespace {
            start.push_attribute((concat_prefix().as_str(), self.namespace.as_str()));
        }
        for (key, value) in &self.attributes {
            check(value)?;
            start.push_attribute((key.as_str(), value.as_str()));
        }
        if self.children.is_empty() && self.text.is_empty() {
            return writer.write_event(Event::Empty(start)).map_err(failed);
        }
        check(&self.text)?;
        writer.write_event(Event::Start(start)).map_err(failed)?;
        if !self.text.is_empty() {
            writer
                .write_event(Event::Text(BytesText::new(&self.text)))
                .map_err(failed)?;
        }
        for child in &self.children {
            child.write(writer, &self.namespace)?;
        }
        writer
            .write_event(Event::End(BytesEnd::new(name.as_ref())))
            .map_err(failed)
    }

    /// Reads a document.
    ///
    /// # Errors
    /// `HypervisorFailed` when it is not well-formed, has a document type or breaks a bound.
    pub(crate) fn parse(xml: &str) -> Result<Self> {
        parse(xml).map_err(|cause| {
            Error::new(ErrorCode::HypervisorFailed, "cannot read libvirt's XML").because(cause)
        })
    }
}

/// The one prefix we write. libvirt keeps it, and readers go by the namespace.
pub(crate) const PREFIX: &str = "ghost";

fn concat_prefix() -> String {
    format!("xmlns:{PREFIX}")
}

/// XML 1.0, production 2 (Char), less the control characters: libvirt normalises or refuses them.
pub(crate) fn is_xml_char(c: char) -> bool {
    !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}')
}

fn check(value: &str) -> Result<()> {
    value
        .chars()
        .find(|c| !is_xml_char(*c))
        .map_or(Ok(()), |bad| {
            Err(Error::new(
                ErrorCode::InvalidArgument,
                "a name or path holds a character that libvirt cannot carry",
            )
            .because(format!("{value:?} holds {bad:?}")))
        })
}

fn parse(xml: &str) -> Result<Element, String> {
    if xml.len() > MAX_BYTES {
        return Err(format!(
            "the document has {} bytes, at most {MAX_BYTES} are read",
            xml.len()
        ));
    }
    let mut reader = NsReader::from_str(xml);
    let mut open: Vec<Element> = Vec::new();
    let mut elements = 0usize;
    let mut root = None;
    loop {
        let (resolved, event) = reader
            .read_resolved_event()
            .map_err(|error| error.to_string())?;
        match event {
            Event::Start(start) => {
                let element = read_start(&resolved, &start)?;
                elements += 1;
                if open.len() >= MAX_DEPTH || elements > MAX_ELEMENTS || root.is_some() {
                    return Err("the document is too deep, too long or has two roots".into());
                }
                open.push(element);
            }
            Event::Empty(start) => {
                let element = read_start(&resolved, &start)?;
                elements += 1;
                if open.len() >= MAX_DEPTH || elements > MAX_ELEMENTS || root.is_some() {
                    return Err("the document is too deep, too long or has two roots".into());
                }
                close(element, &mut open, &mut root);
            }
            Event::End(_) => {
                let mut element = open.pop().ok_or("an element ends that never began")?;
                element.text = element.text.trim().to_owned();
                close(element, &mut open, &mut root);
            }
            Event::Text(text) => {
                if let Some(element) = open.last_mut() {
                    element.text.push_str(&text.xml10_content());
                }
            }
            Event::CData(text) => {
                if let Some(element) = open.last_mut() {
                    element.text.push_str(&text.xml10_content());
                }
            }
            Event::GeneralRef(reference) => {
                let character = match reference
                    .resolve_char_ref()
                    .map_err(|error| error.to_string())?
                {
                    Some(character) => character,
                    None => match reference.xml10_content().as_ref() {
                        "lt" => '<',
                        "gt" => '>',
                        "amp" => '&',
                        "apos" => '\'',
                        "quot" => '"',
                        other => return Err(format!("the entity {other:?} is not known")),
                    },
                };
                if let Some(element) = open.last_mut() {
                    element.text.push(character);
                }
            }
            Event::DocType(_) => return Err("a document type is not accepted".into()),
            Event::Decl(_) | Event::PI(_) | Event::Comment(_) => {}
            Event::Eof => break,
        }
    }
    if !open.is_empty() {
        return Err("the document ends inside an element".into());
    }
    root.ok_or_else(|| "the document is empty".into())
}

fn close(element: Element, open: &mut [Element], root: &mut Option<Element>) {
    match open.last_mut() {
        Some(parent) => parent.children.push(element),
        None => *root = Some(element),
    }
}

fn read_start(resolved: &ResolveResult<'_>, start: &BytesStart<'_>) -> Result<Element, String> {
    let namespace = match resolved {
        ResolveResult::Bound(Namespace(namespace)) => (*namespace).to_owned(),
        ResolveResult::Unbound => String::new(),
        ResolveResult::Unknown(prefix) => {
            return Err(format!("the prefix {prefix:?} is not declared"));
        }
    };
    let mut element = Element::in_namespace(&namespace, start.local_name().as_ref());
    for attribute in start.attributes() {
        let attribute = attribute.map_err(|error| error.to_string())?;
        if attribute.key.as_namespace_binding().is_some() {
            continue;
        }
        let value = attribute
            .normalized_value(XmlVersion::Implicit1_0)
            .map_err(|error| error.to_string())?;
        element
            .attributes
            .push((attribute.key.as_ref().to_owned(), value.into_owned()));
    }
    Ok(element)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_namespaces_entities_and_text() {
        let xml = "<?xml version='1.0'?><!-- c --><domain a='x&amp;y&#10;z'>\n <name>a&lt;b</name>\
                   <g:vm xmlns:g='urn:g' id='1'><g:x/></g:vm><vm xmlns='urn:g'/></domain>";
        let root = Element::parse(xml).unwrap();
        assert_eq!(root.attribute("a"), Some("x&y\nz"));
        assert_eq!(root.find("name").unwrap().text, "a<b");
        assert_eq!(root.all_in("urn:g", "vm").count(), 2);
        assert_eq!(root.all("vm").count(), 0);
    }

    #[test]
    fn refuses_what_could_harm() {
        let deep = "<a>".repeat(100) + &"</a>".repeat(100);
        for bad in [
            "",
            "<a>",
            "<a></b>",
            "<a/><b/>",
            "<p:a/>",
            "<a>&nosuch;</a>",
            "<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>",
            "<a b='1' b='2'/>",
            "<a b='&x;'/>",
            deep.as_str(),
        ] {
            let error = Element::parse(bad).unwrap_err();
            assert_eq!(error.code(), ErrorCode::HypervisorFailed, "{bad}");
        }
        let long = format!("<a>{}</a>", "<b/>".repeat(MAX_ELEMENTS));
        assert!(Element::parse(&long).is_err());
    }

    #[test]
    fn refuses_to_write_what_xml_cannot_carry() {
        for bad in ["\0", "\u{1b}[31m", "\u{ffff}", "a\nb"] {
            let error = Element::new("a").with("b", bad).to_xml().unwrap_err();
            assert_eq!(error.code(), ErrorCode::InvalidArgument);
            assert!(Element::new("a").text(bad).to_xml().is_err());
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "[<>&;'\"=/!\\[\\]a-c: \\PC]{0,64}") {
            let _ = Element::parse(&text);
        }

        #[test]
        fn what_is_written_is_read(value in "\\PC{0,40}", text in "\\PC{0,40}") {
            prop_assume!(value.chars().chain(text.chars()).all(is_xml_char));
            let element = Element::new("a")
                .with("v", value)
                .child(Element::in_namespace("urn:x", "b").text(text.trim()).child(Element::in_namespace("urn:x", "c")));
            let xml = element.to_xml().unwrap();
            prop_assert_eq!(Element::parse(&xml).unwrap(), element);
        }
    }
}
