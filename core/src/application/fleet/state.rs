//! All records of the fleet as they stand in memory, with the indexes by which they are found.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ghost_domain::{
    CommandId, CredentialId, Error, ErrorCode, HostId, HostName, RequestId, Result, TenantName,
    Timestamp, VmId,
};
use uuid::Uuid;

use crate::domain::ports::{Condition, RecordChange, Write};
use crate::domain::{
    Caller, FleetKey, HeldRoom, HostRecord, Inventory, JoinToken, Ownership, QueuedCommand, Record,
    RecordKey, Replica, SentCreate, Stored, Tenant, User,
};

/// A record with the version that the store gave it.
#[derive(Clone, Debug)]
struct Versioned<T> {
    version: u64,
    value: T,
}

/// What a transaction decided: what must hold, what is written, and what its caller gets.
pub type Decision<T> = (Vec<Condition>, Vec<Write>, T);

/// Whom a change concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Touched {
    /// Hosts whose record, inventory or owner changed.
    pub(super) hosts: HashSet<HostId>,
    /// Hosts whose queue changed.
    pub(super) queues: HashSet<HostId>,
}

impl Touched {
    pub(super) fn is_empty(&self) -> bool {
        self.hosts.is_empty() && self.queues.is_empty()
    }
}

/// All records of the fleet. Values that are not small stand behind an [`Arc`], so that a reader
/// takes what it needs and lets the lock go.
#[derive(Debug, Default)]
pub struct FleetState {
    revision: u64,
    /// Whether other replicas use the same records.
    shared: bool,
    hosts: BTreeMap<HostId, Versioned<Arc<HostRecord>>>,
    /// The same in the order in which they are listed: by tenant and name.
    listed: BTreeMap<(TenantName, HostName, HostId), Arc<HostRecord>>,
    /// By name first, so that one without a tenant finds all hosts of a name. The tenant is always
    /// there: `None` sorts before all of them, which makes it the begin of a search.
    names: BTreeMap<(String, Option<TenantName>), Versioned<HostId>>,
    inventories: HashMap<HostId, Versioned<Arc<Inventory>>>,
    owners: HashMap<HostId, Versioned<Ownership>>,
    commands: HashMap<CommandId, Versioned<Arc<QueuedCommand>>>,
    /// The commands of each host by their place in its queue.
    queues: BTreeMap<(HostId, u64), CommandId>,
    requests: HashMap<(HostId, RequestId), CommandId>,
    tenants: BTreeMap<TenantName, Versioned<Tenant>>,
    rooms: BTreeMap<TenantName, Versioned<Vec<HeldRoom>>>,
    sent: HashMap<Uuid, Versioned<SentCreate>>,
    /// The same by when they are over.
    sent_until: BTreeSet<(Timestamp, Uuid)>,
    users: BTreeMap<CredentialId, Versioned<Arc<User>>>,
    keys: BTreeMap<CredentialId, Versioned<Arc<FleetKey>>>,
    tokens: BTreeMap<CredentialId, Versioned<Arc<JoinToken>>>,
    replicas: BTreeMap<String, Versioned<Replica>>,
    known_replicas: BTreeMap<String, Versioned<Replica>>,
    epoch: Option<Versioned<u64>>,
    core_id: Option<Versioned<String>>,
    authority: Option<Versioned<String>>,
}

/// A command's place in its host's queue: one that ended may have been replaced there by nothing
/// else, because generations are never used twice.
fn place(command: &QueuedCommand) -> (HostId, u64) {
    (command.host, command.generation)
}

fn listed_as(host: &HostRecord) -> (TenantName, HostName, HostId) {
    (host.tenant.clone(), host.name.clone(), host.id)
}

impl FleetState {
    /// Nothing yet, of a store that other replicas may use too.
    pub(super) fn of(shared: bool) -> Self {
        Self {
            shared,
            ..Self::default()
        }
    }

    /// The revision of the store that this is of.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Which Core this is.
    pub fn core_id(&self) -> &str {
        self.core_id.as_ref().map_or("", |one| &one.value)
    }

    /// The fingerprint of the CA that signed for this Core's hosts and people, once it is known.
    pub fn authority(&self) -> Option<&str> {
        self.authority.as_ref().map(|one| one.value.as_str())
    }

    /// The epoch of the records.
    pub fn epoch(&self) -> u64 {
        self.epoch.as_ref().map_or(0, |one| one.value)
    }

    /// The epoch for the link that a host has now. Where several replicas use the records it rises
    /// with each change of the owner: by the revision in which the present one took it.
    pub fn link_epoch(&self, host: HostId) -> u64 {
        let owner = self.owners.get(&host).filter(|_| self.shared);
        self.epoch()
            .saturating_add(owner.map_or(0, |owner| owner.version))
    }

    /// All hosts, in the order of their ids.
    pub fn hosts(&self) -> impl ExactSizeIterator<Item = &Arc<HostRecord>> {
        self.hosts.values().map(|one| &one.value)
    }

    /// All hosts, by tenant and name.
    pub fn hosts_by_name(&self) -> impl ExactSizeIterator<Item = &Arc<HostRecord>> {
        self.listed.values()
    }

    /// A host.
    pub fn host(&self, id: HostId) -> Option<&Arc<HostRecord>> {
        self.hosts.get(&id).map(|one| &one.value)
    }

    /// A host by its full id.
    ///
    /// # Errors
    /// `HostNotFound`.
    pub fn require_host(&self, id: HostId) -> Result<&Arc<HostRecord>> {
        self.host(id).ok_or_else(|| host_not_found(&id.to_string()))
    }

    /// The host that has a name in a tenant.
    pub fn host_named(&self, tenant: &TenantName, name: &str) -> Option<&Arc<HostRecord>> {
        let key = (name.to_owned(), Some(tenant.clone()));
        let id = self.names.get(&key)?.value;
        self.host(id)
    }

    /// The host that a caller means: a name in the caller's tenant, `tenant/name`, a full id or a
    /// unique prefix of one. What the caller may not see is not found.
    ///
    /// # Errors
    /// `HostNotFound`, `HostAmbiguous`.
    pub fn find_host(&self, caller: &Caller, selector: &str) -> Result<&Arc<HostRecord>> {
        let sees = |host: &&Arc<HostRecord>| caller.sees_host(host.id, &host.tenant);
        if let Some((tenant, name)) = selector.split_once('/') {
            return TenantName::new(tenant)
                .ok()
                .and_then(|tenant| self.host_named(&tenant, name))
                .filter(sees)
                .ok_or_else(|| host_not_found(selector));
        }
        let mut named = match &caller.tenant {
            Some(tenant) => Vec::from_iter(self.host_named(tenant, selector)),
            None => self.hosts_named(selector),
        };
        named.retain(|host| sees(host));
        match named.as_slice() {
            [one] => return Ok(one),
            [] => {}
            [first, second, ..] => {
                return Err(Error::new(
                    ErrorCode::HostAmbiguous,
                    format!("{selector:?} is the name of more than one host"),
                )
                .because(format!(
                    "{}/{selector} and {}/{selector} are",
                    first.tenant, second.tenant
                ))
                .hint("write the tenant too: tenant/name"));
            }
        }
        let mut prefixed = self.hosts_with_prefix(selector).filter(sees);
        match (prefixed.next(), prefixed.next()) {
            (Some(one), None) => Ok(one),
            (Some(first), Some(second)) => Err(Error::new(
                ErrorCode::HostAmbiguous,
                format!("more than one host's id begins with {selector:?}"),
            )
            .because(format!("{} and {} do", first.id, second.id))
            .hint("give more of the id: ghostctl host list")),
            (None, _) => Err(host_not_found(selector)),
        }
    }

    fn hosts_named(&self, name: &str) -> Vec<&Arc<HostRecord>> {
        self.names
            .range((name.to_owned(), None)..)
            .take_while(|((one, _), _)| one == name)
            .filter_map(|(_, id)| self.host(id.value))
            .collect()
    }

    fn hosts_with_prefix(&self, prefix: &str) -> impl Iterator<Item = &Arc<HostRecord>> {
        let prefix = prefix.to_ascii_lowercase();
        let begin = lowest_id(&prefix);
        begin
            .into_iter()
            .flat_map(move |begin| self.hosts.range(begin..))
            .map(|(_, one)| &one.value)
            .take_while(move |host| host.id.to_string().starts_with(&prefix))
    }

    /// What a host last said of itself, as it is stored. Of a host that is linked here,
    /// [`super::Fleet::inventory`] knows better.
    pub fn inventory(&self, host: HostId) -> Option<&Arc<Inventory>> {
        self.inventories.get(&host).map(|one| &one.value)
    }

    /// The replica that has a host's link.
    pub fn owner(&self, host: HostId) -> Option<&Ownership> {
        self.owners.get(&host).map(|one| &one.value)
    }

    /// The hosts that a replica has the links of.
    pub fn owned_by(&self, replica: &str) -> impl Iterator<Item = &Ownership> {
        self.owners
            .values()
            .map(|one| &one.value)
            .filter(move |owner| owner.replica == replica)
    }

    /// A command.
    pub fn command(&self, id: CommandId) -> Option<&Arc<QueuedCommand>> {
        self.commands.get(&id).map(|one| &one.value)
    }

    /// All commands, in no order.
    pub fn commands(&self) -> impl Iterator<Item = &Arc<QueuedCommand>> {
        self.commands.values().map(|one| &one.value)
    }

    /// The commands of a host in the order of its queue, those that ended included.
    pub fn commands_of(
        &self,
        host: HostId,
    ) -> impl DoubleEndedIterator<Item = &Arc<QueuedCommand>> {
        self.queues
            .range((host, 0)..=(host, u64::MAX))
            .filter_map(|(_, id)| self.command(*id))
    }

    /// Those of them that have not ended.
    pub fn open_commands(
        &self,
        host: HostId,
    ) -> impl DoubleEndedIterator<Item = &Arc<QueuedCommand>> {
        self.commands_of(host)
            .filter(|command| !command.status.is_finished())
    }

    /// The command that was queued under an idempotency key.
    pub fn command_by_request(
        &self,
        host: HostId,
        request: &RequestId,
    ) -> Option<&Arc<QueuedCommand>> {
        self.command(*self.requests.get(&(host, request.clone()))?)
    }

    /// All tenants, by name.
    pub fn tenants(&self) -> impl ExactSizeIterator<Item = &Tenant> {
        self.tenants.values().map(|one| &one.value)
    }

    /// A tenant.
    pub fn tenant(&self, name: &TenantName) -> Option<&Tenant> {
        self.tenants.get(name).map(|one| &one.value)
    }

    /// A tenant, as one that a caller named.
    ///
    /// # Errors
    /// `TenantNotFound`.
    pub fn require_tenant(&self, name: &TenantName) -> Result<&Tenant> {
        self.tenant(name).ok_or_else(|| {
            Error::new(
                ErrorCode::TenantNotFound,
                format!("there is no tenant {name}"),
            )
            .hint("see which there are: ghostctl tenant list")
        })
    }

    /// The room that replicas hold for VMs of a tenant that are being made, that which is over
    /// included.
    pub fn room(&self, tenant: &TenantName) -> &[HeldRoom] {
        self.rooms.get(tenant).map_or(&[], |one| &one.value)
    }

    /// Where a create went.
    pub fn sent(&self, id: Uuid) -> Option<&SentCreate> {
        self.sent.get(&id).map(|one| &one.value)
    }

    /// The creates of which it is remembered where they went, the oldest first.
    pub fn all_sent(&self) -> impl ExactSizeIterator<Item = (Timestamp, Uuid)> {
        self.sent_until.iter().copied()
    }

    /// All users, by id.
    pub fn users(&self) -> impl ExactSizeIterator<Item = &Arc<User>> {
        self.users.values().map(|one| &one.value)
    }

    /// A user.
    pub fn user(&self, id: CredentialId) -> Option<&Arc<User>> {
        self.users.get(&id).map(|one| &one.value)
    }

    /// All keys, by id.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &Arc<FleetKey>> {
        self.keys.values().map(|one| &one.value)
    }

    /// A key.
    pub fn key(&self, id: CredentialId) -> Option<&Arc<FleetKey>> {
        self.keys.get(&id).map(|one| &one.value)
    }

    /// All tokens, used ones included.
    pub fn tokens(&self) -> impl ExactSizeIterator<Item = &Arc<JoinToken>> {
        self.tokens.values().map(|one| &one.value)
    }

    /// A token.
    pub fn token(&self, id: CredentialId) -> Option<&Arc<JoinToken>> {
        self.tokens.get(&id).map(|one| &one.value)
    }

    /// The replicas that run.
    pub fn replicas(&self) -> impl ExactSizeIterator<Item = &Replica> {
        self.replicas.values().map(|one| &one.value)
    }

    /// A replica that runs.
    pub fn replica(&self, name: &str) -> Option<&Replica> {
        self.replicas.get(name).map(|one| &one.value)
    }

    /// The replicas that ran lately, those that run included; `since` is when each last said so.
    pub fn known_replicas(&self) -> impl ExactSizeIterator<Item = &Replica> {
        self.known_replicas.values().map(|one| &one.value)
    }

    /// VMs of all hosts as they are stored: the host, its inventory, the VM.
    pub fn find_vm(&self, id: VmId) -> Option<&Arc<HostRecord>> {
        self.inventories
            .iter()
            .find(|(_, inventory)| inventory.value.vms.contains_key(&id))
            .and_then(|(host, _)| self.host(*host))
    }

    /// A record's version; `None` where there is none.
    pub fn version(&self, key: &RecordKey) -> Option<u64> {
        use RecordKey as K;
        match key {
            K::Host(id) => self.hosts.get(id).map(|one| one.version),
            K::HostName(tenant, name) => self
                .names
                .get(&(name.clone(), Some(tenant.clone())))
                .map(|one| one.version),
            K::Inventory(id) => self.inventories.get(id).map(|one| one.version),
            K::Owner(id) => self.owners.get(id).map(|one| one.version),
            K::Command(host, id) => self
                .commands
                .get(id)
                .filter(|one| one.value.host == *host)
                .map(|one| one.version),
            K::Tenant(name) => self.tenants.get(name).map(|one| one.version),
            K::Room(name) => self.rooms.get(name).map(|one| one.version),
            K::Sent(id) => self.sent.get(id).map(|one| one.version),
            K::User(id) => self.users.get(id).map(|one| one.version),
            K::Key(id) => self.keys.get(id).map(|one| one.version),
            K::Token(id) => self.tokens.get(id).map(|one| one.version),
            K::Replica(name) => self.replicas.get(name).map(|one| one.version),
            K::KnownReplica(name) => self.known_replicas.get(name).map(|one| one.version),
            K::Epoch => self.epoch.as_ref().map(|one| one.version),
            K::CoreId => self.core_id.as_ref().map(|one| one.version),
            K::Authority => self.authority.as_ref().map(|one| one.version),
        }
    }

    /// Whether a condition holds here.
    pub(super) fn holds(&self, condition: &Condition) -> bool {
        match condition {
            Condition::Absent(key) => self.version(key).is_none(),
            Condition::Unchanged(key, version) => self.version(key) == Some(*version),
        }
    }

    /// The begin of a change that is to be made of this state.
    pub fn draft(&self) -> Draft<'_> {
        Draft {
            state: self,
            conditions: Vec::new(),
            writes: Vec::new(),
        }
    }

    fn keys_in_memory(&self) -> impl Iterator<Item = (RecordKey, u64)> {
        use RecordKey as K;
        let hosts = self
            .hosts
            .iter()
            .map(|(id, one)| (K::Host(*id), one.version));
        let names = self.names.iter().filter_map(|((name, tenant), one)| {
            let key = K::HostName(tenant.clone()?, name.clone());
            Some((key, one.version))
        });
        let inventories = self
            .inventories
            .iter()
            .map(|(id, one)| (K::Inventory(*id), one.version));
        let owners = self
            .owners
            .iter()
            .map(|(id, one)| (K::Owner(*id), one.version));
        let commands = self
            .commands
            .iter()
            .map(|(id, one)| (K::Command(one.value.host, *id), one.version));
        let tenants = self
            .tenants
            .iter()
            .map(|(name, one)| (K::Tenant(name.clone()), one.version));
        let rooms = self
            .rooms
            .iter()
            .map(|(name, one)| (K::Room(name.clone()), one.version));
        let sent = self
            .sent
            .iter()
            .map(|(id, one)| (K::Sent(*id), one.version));
        let users = self
            .users
            .iter()
            .map(|(id, one)| (K::User(*id), one.version));
        let keys = self.keys.iter().map(|(id, one)| (K::Key(*id), one.version));
        let tokens = self
            .tokens
            .iter()
            .map(|(id, one)| (K::Token(*id), one.version));
        let replicas = self
            .replicas
            .iter()
            .map(|(name, one)| (K::Replica(name.clone()), one.version));
        let known_replicas = self
            .known_replicas
            .iter()
            .map(|(name, one)| (K::KnownReplica(name.clone()), one.version));
        let epoch = self.epoch.iter().map(|one| (K::Epoch, one.version));
        let core_id = self.core_id.iter().map(|one| (K::CoreId, one.version));
        let authority = self.authority.iter().map(|one| (K::Authority, one.version));
        hosts
            .chain(names)
            .chain(inventories)
            .chain(owners)
            .chain(commands)
            .chain(tenants)
            .chain(rooms)
            .chain(sent)
            .chain(users)
            .chain(keys)
            .chain(tokens)
            .chain(replicas)
            .chain(known_replicas)
            .chain(epoch)
            .chain(core_id)
            .chain(authority)
    }

    /// Takes in one change.
    pub(super) fn apply(&mut self, change: RecordChange, touched: &mut Touched) {
        let RecordChange {
            key,
            record,
            version,
        } = change;
        match (key, record) {
            (RecordKey::Host(id), record) => {
                touched.hosts.insert(id);
                let record = match record {
                    Some(Record::Host(host)) => Some(Arc::from(host)),
                    _ => None,
                };
                if let Some(old) = self.hosts.get(&id) {
                    self.listed.remove(&listed_as(&old.value));
                }
                if let Some(record) = &record {
                    self.listed.insert(listed_as(record), Arc::clone(record));
                }
                put_or_remove(&mut self.hosts, id, record, version);
            }
            (RecordKey::HostName(tenant, name), record) => {
                let record = match record {
                    Some(Record::HostName(id)) => Some(id),
                    _ => None,
                };
                put_or_remove(&mut self.names, (name, Some(tenant)), record, version);
            }
            (RecordKey::Inventory(id), Some(Record::Inventory(inventory))) => {
                touched.hosts.insert(id);
                let value = Arc::from(inventory);
                self.inventories.insert(id, Versioned { version, value });
            }
            (RecordKey::Inventory(id), _) => {
                touched.hosts.insert(id);
                self.inventories.remove(&id);
            }
            (RecordKey::Owner(id), Some(Record::Owner(value))) => {
                touched.hosts.insert(id);
                self.owners.insert(id, Versioned { version, value });
            }
            (RecordKey::Owner(id), _) => {
                touched.hosts.insert(id);
                self.owners.remove(&id);
            }
            (RecordKey::Command(host, id), record) => {
                touched.queues.insert(host);
                if let Some(old) = self.commands.remove(&id) {
                    self.queues.remove(&place(&old.value));
                    self.requests.remove(&(host, old.value.request_id.clone()));
                }
                if let Some(Record::Command(command)) = record {
                    let value: Arc<QueuedCommand> = Arc::from(command);
                    self.queues.insert(place(&value), id);
                    self.requests.insert((host, value.request_id.clone()), id);
                    self.commands.insert(id, Versioned { version, value });
                }
            }
            (RecordKey::Tenant(name), record) => {
                let record = match record {
                    Some(Record::Tenant(tenant)) => Some(tenant),
                    _ => None,
                };
                put_or_remove(&mut self.tenants, name, record, version);
            }
            (RecordKey::Room(name), record) => {
                let record = match record {
                    Some(Record::Room(held)) => Some(held),
                    _ => None,
                };
                put_or_remove(&mut self.rooms, name, record, version);
            }
            (RecordKey::Sent(id), record) => {
                if let Some(old) = self.sent.remove(&id) {
                    self.sent_until.remove(&(old.value.until, id));
                }
                if let Some(Record::Sent(value)) = record {
                    self.sent_until.insert((value.until, id));
                    self.sent.insert(id, Versioned { version, value });
                }
            }
            (RecordKey::User(id), record) => {
                let record = match record {
                    Some(Record::User(user)) => Some(Arc::new(user)),
                    _ => None,
                };
                put_or_remove(&mut self.users, id, record, version);
            }
            (RecordKey::Key(id), record) => {
                let record = match record {
                    Some(Record::Key(key)) => Some(Arc::new(key)),
                    _ => None,
                };
                put_or_remove(&mut self.keys, id, record, version);
            }
            (RecordKey::Token(id), record) => {
                let record = match record {
                    Some(Record::Token(token)) => Some(Arc::new(token)),
                    _ => None,
                };
                put_or_remove(&mut self.tokens, id, record, version);
            }
            (RecordKey::Replica(name), record) => {
                let record = match record {
                    Some(Record::Replica(replica)) => Some(replica),
                    _ => None,
                };
                put_or_remove(&mut self.replicas, name, record, version);
            }
            (RecordKey::KnownReplica(name), record) => {
                let record = match record {
                    Some(Record::KnownReplica(replica)) => Some(replica),
                    _ => None,
                };
                put_or_remove(&mut self.known_replicas, name, record, version);
            }
            (RecordKey::Epoch, record) => {
                self.epoch = match record {
                    Some(Record::Epoch(value)) => Some(Versioned { version, value }),
                    _ => None,
                };
            }
            (RecordKey::CoreId, record) => {
                self.core_id = match record {
                    Some(Record::CoreId(value)) => Some(Versioned { version, value }),
                    _ => None,
                };
            }
            (RecordKey::Authority, record) => {
                self.authority = match record {
                    Some(Record::Authority(value)) => Some(Versioned { version, value }),
                    _ => None,
                };
            }
        }
        self.revision = self.revision.max(version);
    }

    /// Becomes what the store holds as of `revision`, by as few changes as possible.
    pub(super) fn replace(&mut self, revision: u64, records: Vec<Stored>, touched: &mut Touched) {
        let mut gone: HashMap<RecordKey, u64> = self.keys_in_memory().collect();
        let mut news = Vec::new();
        for Stored {
            key,
            record,
            version,
        } in records
        {
            if gone.remove(&key) != Some(version) {
                news.push(RecordChange {
                    key,
                    record: Some(record),
                    version,
                });
            }
        }
        let gone = gone.into_keys().map(|key| RecordChange {
            key,
            record: None,
            version: 0,
        });
        // What is gone first: a name may have gone over to another host meanwhile.
        for change in gone.chain(news) {
            self.apply(change, touched);
        }
        self.revision = revision;
    }
}

fn put_or_remove<K: Ord, V>(
    map: &mut BTreeMap<K, Versioned<V>>,
    key: K,
    value: Option<V>,
    version: u64,
) {
    match value {
        Some(value) => {
            map.insert(key, Versioned { version, value });
        }
        None => {
            map.remove(&key);
        }
    }
}

fn host_not_found(selector: &str) -> Error {
    Error::new(
        ErrorCode::HostNotFound,
        format!(
            "there is no host {:?}",
            selector.chars().take(100).collect::<String>()
        ),
    )
    .hint("see which there are: ghostctl host list")
}

/// The least id whose text begins with `prefix`; `None` where none can.
fn lowest_id(prefix: &str) -> Option<HostId> {
    const SHAPE: &str = "00000000-0000-0000-0000-000000000000";
    if prefix.is_empty() || prefix.len() > SHAPE.len() || !prefix.is_ascii() {
        return None;
    }
    let text = format!("{prefix}{}", SHAPE.get(prefix.len()..)?);
    Uuid::try_parse(&text).ok().map(HostId::from_uuid)
}

/// A change in the making. Each record that is put or deleted has to be as it stands here when the
/// change takes effect, or the change is decided anew.
#[derive(Debug)]
pub struct Draft<'a> {
    state: &'a FleetState,
    conditions: Vec<Condition>,
    writes: Vec<Write>,
}

impl Draft<'_> {
    /// The record must still be as it is here (or still not be).
    pub fn unchanged(&mut self, key: &RecordKey) -> &mut Self {
        let condition = match self.state.version(key) {
            Some(version) => Condition::Unchanged(key.clone(), version),
            None => Condition::Absent(key.clone()),
        };
        if !self.conditions.contains(&condition) {
            self.conditions.push(condition);
        }
        self
    }

    /// Inserts or replaces.
    pub fn put(&mut self, key: RecordKey, record: Record) -> &mut Self {
        self.unchanged(&key);
        self.writes.push(Write::Put(key, record));
        self
    }

    /// Inserts or replaces a host's record.
    pub fn put_host(&mut self, host: HostRecord) -> &mut Self {
        self.put(RecordKey::Host(host.id), Record::Host(Box::new(host)))
    }

    /// Inserts or replaces a command.
    pub fn put_command(&mut self, command: QueuedCommand) -> &mut Self {
        self.put(
            RecordKey::Command(command.host, command.id),
            Record::Command(Box::new(command)),
        )
    }

    /// Removes.
    pub fn delete(&mut self, key: RecordKey) -> &mut Self {
        self.unchanged(&key);
        self.writes.push(Write::Delete(key));
        self
    }

    /// The decision, for [`super::Fleet::transact`].
    pub fn done<T>(self, value: T) -> Decision<T> {
        (self.conditions, self.writes, value)
    }
}
