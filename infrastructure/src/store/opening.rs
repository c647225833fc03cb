//! Opening a store: what is believed, what is set aside, and what is put in its place.
//!
//! ```text
//! <directory>/            0700, one process (lock)
//!   state/                the engine's files
//!   sequence              the sidecar: what was acknowledged last
//!   exports/              the newest three exports
//!   ballast               room in reserve for a full disk
//!   damage                what was found damaged, until somebody dealt with it
//!   state.corrupt-<time>/ engine files that were set aside, the newest three
//! ```
//!
//! The engine's state is believed when every record proves itself, the manifest agrees with them,
//! and neither the sidecar nor an export knows of a newer one. Otherwise it is set aside, never
//! deleted, and the newest valid export takes its place; the caller is told and rebuilds the rest
//! from libvirt. A failure of the system (no permission, no room, an I/O error) is not damage:
//! then nothing is moved.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use ghost_domain::{Error, ErrorCode, Result, Timestamp};
use time::OffsetDateTime;
use time::macros::format_description;

use super::StoreOptions;
use super::ballast::Ballast;
use super::engine::{self, Engine, KeyValueEngine, guard};
use super::export::{self, Export};
use super::fault::Fault;
use super::files::{self, Layout};
use super::lock::Lock;
use super::probe;
use super::records::{self, Batch, Contents, Manifest, Records};
use super::sidecar::{Mark, Reading, Sidecar};
use super::steps::{Steps, Unwatched};

/// How many damaged states are kept for those who want to look at them.
const KEPT_CORRUPT: usize = 3;
const CORRUPT: &str = "state.corrupt-";
const MAX_DAMAGE_TEXT: usize = 4096;

/// What goes wrong on a file system with less free space than this is taken for want of room: the
/// engines do not always say so.
pub(super) const NO_ROOM: u64 = 1 << 20;

/// An engine is not opened, and no new one made, with less free space than this: they write while
/// they open, and sled hangs where it cannot.
pub(super) const OPENING_ROOM: u64 = 4 << 20;

/// An open store.
pub(super) struct Opened {
    pub(super) lock: Lock,
    pub(super) engine: Box<dyn KeyValueEngine>,
    pub(super) sidecar: Sidecar,
    pub(super) records: Records,
    pub(super) manifest: Manifest,
    pub(super) ballast: Ballast,
    pub(super) damage: Option<String>,
}

/// Opens the store that `options` name, making it at the first start.
///
/// # Errors
/// [`ErrorCode::StoreUnavailable`]: it is in use, the system failed, or a newer agent wrote it.
pub(super) fn open(options: &StoreOptions, layout: &Layout) -> Result<Opened> {
    let prepare = |error: io::Error| {
        Error::new(
            ErrorCode::StoreUnavailable,
            format!(
                "the state store's directory {} cannot be used",
                layout.root.display()
            ),
        )
        .because(error)
        .hint("the agent needs a directory of its own that it can write to")
    };
    files::make_directory(&layout.root).map_err(prepare)?;
    let lock = Lock::take(&layout.lock())?;
    let mut ballast = Ballast::new(layout.ballast(), options.ballast_bytes);
    // Never on a full disk: the engines write while they open, and what they leave half written
    // would look like damage.
    let mut outcome = ballast
        .make_room(OPENING_ROOM)
        .and_then(|()| guard(|| establish(options, layout)));
    if matches!(outcome, Err(Fault::Full(_))) && ballast.release() {
        tracing::warn!("the disk is full; opening the state store on its reserve");
        outcome = guard(|| establish(options, layout));
    }
    let (engine, sidecar, records, manifest) =
        outcome.map_err(|fault| fault.into_open_error(&layout.root))?;
    ballast.restore();
    let damage = read_damage(layout).map_err(|fault| fault.into_open_error(&layout.root))?;
    Ok(Opened {
        lock,
        engine,
        sidecar,
        records,
        manifest,
        ballast,
        damage,
    })
}

type Established = (Box<dyn KeyValueEngine>, Sidecar, Records, Manifest);

/// What examining the directory showed.
enum Finding {
    /// There never was a store.
    FirstStart,
    /// A state that can be believed.
    Sound(Box<Sound>),
    /// A state that cannot, or none where there was one.
    Lost(String),
}

struct Sound {
    engine: Box<dyn KeyValueEngine>,
    kind: Engine,
    contents: Contents,
    reading: Reading,
    /// Whether the newest batch was never acknowledged and has to be taken back.
    unacknowledged: bool,
    /// What is odd beside the state, which itself is whole.
    oddity: Option<String>,
}

fn establish(options: &StoreOptions, layout: &Layout) -> Result<Established, Fault> {
    system(files::make_directory(&layout.exports()))?;
    tidy(layout)?;
    let reading = system(Sidecar::read(&layout.sidecar()))?;
    match examine(options, layout, reading)? {
        Finding::FirstStart => {
            let manifest = Manifest {
                mark: Mark {
                    store: *uuid::Uuid::new_v4().as_bytes(),
                    sequence: 1,
                    count: 0,
                    digest: 0,
                },
                base: 0,
                undo: 0,
            };
            let engine = install(
                options,
                layout,
                &Records::default(),
                &manifest,
                Previous::Absent,
            )?;
            let sidecar = system(Sidecar::create(&layout.sidecar(), manifest.mark))?;
            Ok((engine, sidecar, Records::default(), manifest))
        }
        Finding::Sound(sound) => settle(options, layout, *sound),
        Finding::Lost(why) => recover(options, layout, reading, &why),
    }
}

/// An error of the file system while handling our own few files is never taken for damage.
fn system<T>(result: io::Result<T>) -> Result<T, Fault> {
    result.map_err(|error| {
        if files::is_full(&error) {
            Fault::Full(error.to_string())
        } else {
            Fault::Io(error.to_string())
        }
    })
}

/// Ends what a crash interrupted between two renames, and removes what was never in use.
fn tidy(layout: &Layout) -> Result<(), Fault> {
    let (state, old) = (layout.state(), layout.state_old());
    if old.exists() {
        if state.exists() {
            system(files::remove(&old))?;
        } else {
            system(fs::rename(&old, &state))?;
            system(files::sync_directory(&layout.root))?;
        }
    }
    system(files::remove(&layout.state_new()))?;
    for directory in [layout.root.clone(), layout.exports()] {
        for entry in system(fs::read_dir(&directory))? {
            let path = system(entry)?.path();
            if path.extension().is_some_and(|extension| extension == "tmp") {
                system(files::remove(&path))?;
            }
        }
    }
    Ok(())
}

fn examine(options: &StoreOptions, layout: &Layout, reading: Reading) -> Result<Finding, Fault> {
    let exports = system(export::list(&layout.exports()))?;
    let state = layout.state();
    if !state.exists() {
        let used_before = reading != Reading::Missing
            || !exports.is_empty()
            || layout.damage().exists()
            || !corrupt_states(layout)?.is_empty();
        return Ok(if used_before {
            Finding::Lost("the store's state is missing".into())
        } else {
            Finding::FirstStart
        });
    }
    let Some(kind) = engine::detect(&state) else {
        return Ok(Finding::Lost("the engine's files are missing".into()));
    };
    let opened = probe::open_verified(&state, options.helper.as_ref(), options.limits.open);
    let (engine, contents) = match opened {
        Ok(opened) => opened,
        Err(Fault::Damaged(why)) => {
            if files::free_bytes(&layout.root).is_ok_and(|free| free < NO_ROOM) {
                return Err(Fault::Full(format!("while the disk is full: {why}")));
            }
            return Ok(Finding::Lost(format!(
                "the {kind} state is damaged ({why})"
            )));
        }
        Err(other) => return Err(other),
    };
    let found = contents.manifest.mark;
    let newer_export = exports
        .iter()
        .take_while(|file| file.sequence > found.sequence)
        .find_map(|file| Some(export::read(&file.path).ok()?.mark.sequence));
    if let Some(newer) = newer_export {
        return Ok(Finding::Lost(rolled_back(
            found.sequence,
            newer,
            "an export",
        )));
    }
    let mut oddity = None;
    let mut unacknowledged = false;
    match reading {
        Reading::Missing => {
            if found.sequence > 1 || found.count > 0 {
                oddity = Some(
                    "the sidecar file is missing, so that an older copy of the store would not be noticed",
                );
            }
        }
        Reading::Damaged => {
            oddity = Some(
                "the sidecar file is damaged, so that an older copy of the store would not be noticed",
            );
        }
        Reading::Clean(mark) | Reading::Suspicious(mark) => {
            if mark.store != found.store {
                return Ok(Finding::Lost("the state belongs to another store".into()));
            }
            if found.sequence < mark.sequence {
                return Ok(Finding::Lost(rolled_back(
                    found.sequence,
                    mark.sequence,
                    "the sidecar",
                )));
            }
            if found.sequence == mark.sequence && found != mark {
                return Ok(Finding::Lost(
                    "the state is not the one that the sidecar describes".into(),
                ));
            }
            if matches!(reading, Reading::Suspicious(_)) {
                oddity = Some(
                    "a part of the sidecar file is damaged, so that an older copy of the store might not be noticed",
                );
            } else if found.sequence > mark.sequence {
                if contents.manifest.base != mark.sequence {
                    oddity = Some("the sidecar file is older than the state");
                } else if contents.manifest.undo > 0 {
                    let before = contents.before_newest();
                    if (before.count(), before.digest()) != (mark.count, mark.digest) {
                        return Ok(Finding::Lost(
                            "taking back a batch that was never acknowledged does not lead to the state before it".into(),
                        ));
                    }
                    unacknowledged = true;
                }
            }
        }
    }
    Ok(Finding::Sound(Box::new(Sound {
        engine,
        kind,
        contents,
        reading,
        unacknowledged,
        oddity: oddity.map(str::to_owned),
    })))
}

fn rolled_back(found: u64, known: u64, witness: &str) -> String {
    format!(
        "the state is older than what was acknowledged (batch {found}, and {witness} knows of batch {known})"
    )
}

/// Makes a believable state the current one: takes back what was not acknowledged, compacts, and
/// moves to the configured engine.
fn settle(options: &StoreOptions, layout: &Layout, sound: Sound) -> Result<Established, Fault> {
    let Sound {
        mut engine,
        kind,
        contents,
        reading,
        unacknowledged,
        oddity,
    } = sound;
    if let Some(oddity) = oddity {
        note_damage(
            layout,
            &format!("{oddity}; the records themselves are whole"),
        )?;
    }
    let mut manifest = contents.manifest;
    let mut records = contents.records.clone();
    if unacknowledged {
        records = contents.before_newest();
        let acknowledged = Mark {
            sequence: manifest.base,
            ..manifest.mark
        };
        let batch = Batch::correct(&contents, &records, &acknowledged)?;
        let steps: &dyn Steps = &Unwatched;
        if let Err(fault) = guard(|| engine.commit(&batch.pairs, steps)) {
            engine.abandon();
            return Err(fault);
        }
        manifest = batch.manifest;
    }
    let size = files::disk_usage(&layout.state());
    let limits = &options.limits;
    let bloated = size > limits.compact_floor
        && (size > records.bytes().saturating_mul(4) || size > limits.compact_bytes);
    if kind != options.engine || bloated {
        tracing::info!(from = %kind, to = %options.engine, size, records = records.count(), "rewriting the state store");
        drop(engine);
        let fresh = Manifest {
            undo: 0,
            ..manifest
        };
        engine = install(options, layout, &records, &fresh, Previous::Replaced)?;
        manifest = fresh;
    }
    let sidecar = match reading {
        Reading::Clean(mark) => {
            let mut sidecar = system(Sidecar::open(&layout.sidecar()))?;
            if mark != manifest.mark {
                system(sidecar.write(manifest.mark))?;
                system(sidecar.sync())?;
            }
            sidecar
        }
        Reading::Missing | Reading::Suspicious(_) | Reading::Damaged => {
            system(Sidecar::create(&layout.sidecar(), manifest.mark))?
        }
    };
    Ok((engine, sidecar, records, manifest))
}

/// Sets the damaged state aside and puts the newest valid export in its place.
fn recover(
    options: &StoreOptions,
    layout: &Layout,
    reading: Reading,
    why: &str,
) -> Result<Established, Fault> {
    let known = match reading {
        Reading::Clean(mark) | Reading::Suspicious(mark) => Some(mark),
        Reading::Missing | Reading::Damaged => None,
    };
    let (export, passed_over) = newest_export(layout, known.map(|mark| mark.store))?;
    let newest_known = known
        .map(|mark| mark.sequence)
        .into_iter()
        .chain(export.as_ref().map(|export| export.mark.sequence))
        .chain(
            system(export::list(&layout.exports()))?
                .first()
                .map(|file| file.sequence),
        )
        .max()
        .unwrap_or(0);
    let records = export
        .as_ref()
        .map(|export| export.records.clone())
        .unwrap_or_default();
    let store = known
        .map(|mark| mark.store)
        .or(export.as_ref().map(|export| export.mark.store))
        .unwrap_or_else(|| *uuid::Uuid::new_v4().as_bytes());
    let manifest = Manifest {
        mark: Mark {
            store,
            sequence: newest_known.saturating_add(1),
            count: records.count(),
            digest: records.digest(),
        },
        base: known.map_or(newest_known, |mark| mark.sequence),
        undo: 0,
    };
    let aside = layout
        .state()
        .exists()
        .then(|| unused_corrupt_name(layout))
        .transpose()?;
    let mut text = why.to_owned();
    if let Some(aside) = &aside {
        text.push_str("; it was set aside as ");
        text.push_str(&aside.file_name().unwrap_or_default().to_string_lossy());
    }
    match &export {
        Some(export) => {
            text.push_str(&format!(
                "; {} records were restored from the export of {}",
                export.records.count(),
                rfc3339(export.created_at)
            ));
            match known {
                Some(mark) if mark.sequence > export.mark.sequence => text.push_str(&format!(
                    ", and {} batches of changes after it are lost",
                    mark.sequence - export.mark.sequence
                )),
                Some(_) => text.push_str(", which holds the newest acknowledged batch"),
                None => text.push_str(", and changes after it are lost"),
            }
        }
        None => text.push_str("; there is no valid export, so that the store is empty"),
    }
    if passed_over > 0 {
        text.push_str(&format!("; damaged exports passed over: {passed_over}"));
    }
    tracing::error!(damage = %text, "the state store was damaged");
    // Before anything moves: after a crash in the midst of this, the next start must still know.
    note_damage(layout, &text)?;
    let previous = aside.map_or(Previous::Absent, Previous::Damaged);
    let engine = install(options, layout, &records, &manifest, previous)?;
    let sidecar = system(Sidecar::create(&layout.sidecar(), manifest.mark))?;
    prune_corrupt(layout)?;
    Ok((engine, sidecar, records, manifest))
}

/// The newest export that can be believed, and how many newer ones could not.
fn newest_export(
    layout: &Layout,
    store: Option<[u8; 16]>,
) -> Result<(Option<Export>, usize), Fault> {
    let mut passed_over = 0;
    for file in system(export::list(&layout.exports()))? {
        match export::read(&file.path) {
            Ok(export) if store.is_none_or(|store| store == export.mark.store) => {
                return Ok((Some(export), passed_over));
            }
            Ok(_) => tracing::warn!(path = %file.path.display(), "an export of another store"),
            Err(Fault::Damaged(why)) => {
                tracing::warn!(path = %file.path.display(), why, "a damaged export");
                passed_over += 1;
            }
            Err(other) => return Err(other),
        }
    }
    Ok((None, passed_over))
}

/// What becomes of the state that stands where a new one is installed.
pub(super) enum Previous {
    /// There is none.
    Absent,
    /// It is removed once the new one stands.
    Replaced,
    /// It is renamed to this.
    Damaged(PathBuf),
}

/// Builds a new state beside the present one and swaps them.
pub(super) fn install(
    options: &StoreOptions,
    layout: &Layout,
    records: &Records,
    manifest: &Manifest,
    previous: Previous,
) -> Result<Box<dyn KeyValueEngine>, Fault> {
    let (state, new, old) = (layout.state(), layout.state_new(), layout.state_old());
    system(files::remove(&new))?;
    let limit = options.limits.open;
    {
        let (kind, new) = (options.engine, new.clone());
        let (records, manifest) = (records.clone(), *manifest);
        probe::bounded(limit, move || {
            let mut engine = engine::open(kind, &new, true)?;
            if let Err(fault) = guard(|| records::fill(&mut *engine, &records, &manifest)) {
                engine.abandon();
                return Err(fault);
            }
            drop(engine);
            files::secure_and_sync_tree(&new)?;
            Ok(())
        })?;
    }
    match &previous {
        Previous::Absent => {}
        Previous::Replaced => {
            system(files::remove(&old))?;
            system(fs::rename(&state, &old))?;
        }
        Previous::Damaged(aside) => system(fs::rename(&state, aside))?,
    }
    system(fs::rename(&new, &state))?;
    system(files::sync_directory(&layout.root))?;
    if matches!(previous, Previous::Replaced) {
        system(files::remove(&old))?;
    }
    // No helper: these are files that we wrote a moment ago.
    let (engine, contents) = probe::open_verified(&state, None, limit)?;
    if contents.manifest == *manifest {
        Ok(engine)
    } else {
        Err(Fault::Io(
            "what was just written reads back differently".into(),
        ))
    }
}

fn corrupt_states(layout: &Layout) -> Result<Vec<PathBuf>, Fault> {
    let mut found = Vec::new();
    for entry in system(fs::read_dir(&layout.root))? {
        let entry = system(entry)?;
        if entry.file_name().to_string_lossy().starts_with(CORRUPT) {
            found.push(entry.path());
        }
    }
    // The names hold the time, so that their order is that of age.
    found.sort_unstable();
    Ok(found)
}

/// A name for a state to be set aside, which nothing has yet.
pub(super) fn unused_corrupt_name(layout: &Layout) -> Result<PathBuf, Fault> {
    let format = format_description!("[year][month][day]T[hour][minute][second]Z");
    let time = OffsetDateTime::now_utc().format(format).unwrap_or_default();
    (0..1000)
        .map(|attempt| match attempt {
            0 => layout.root.join(format!("{CORRUPT}{time}")),
            _ => layout.root.join(format!("{CORRUPT}{time}-{attempt}")),
        })
        .find(|path| !path.exists())
        .ok_or_else(|| Fault::Io("too many damaged states within one second".into()))
}

fn prune_corrupt(layout: &Layout) -> Result<(), Fault> {
    let states = corrupt_states(layout)?;
    let surplus = states.len().saturating_sub(KEPT_CORRUPT);
    for path in states.into_iter().take(surplus) {
        system(files::remove(&path))?;
    }
    Ok(())
}

fn read_damage(layout: &Layout) -> Result<Option<String>, Fault> {
    match fs::read(layout.damage()) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => system(Err(error)),
    }
}

/// Adds to what is known to be damaged.
fn note_damage(layout: &Layout, text: &str) -> Result<(), Fault> {
    let mut whole = read_damage(layout)?.unwrap_or_default();
    if whole.contains(text) {
        return Ok(());
    }
    if !whole.is_empty() {
        whole.push_str("; then: ");
    }
    whole.push_str(text);
    let cut = (0..=MAX_DAMAGE_TEXT.min(whole.len()))
        .rev()
        .find(|at| whole.is_char_boundary(*at))
        .unwrap_or(0);
    whole.truncate(cut);
    system(files::write_whole(&layout.damage(), whole.as_bytes()))
}

fn rfc3339(at: Timestamp) -> String {
    OffsetDateTime::from_unix_timestamp(at.unix_millis() / 1000)
        .ok()
        .and_then(|time| {
            time.format(&time::format_description::well_known::Rfc3339)
                .ok()
        })
        .unwrap_or_else(|| format!("{} ms", at.unix_millis()))
}

/// The wall clock, for the stamps of exports.
pub(super) fn now() -> Timestamp {
    SystemTime::now().into()
}
