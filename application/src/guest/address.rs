//! Register an address of a VM by hand.

use std::net::IpAddr;
use std::sync::Arc;

use ghost_domain::guest::AuditRecord;
use ghost_domain::ports::Change;
use ghost_domain::vm::Vm;
use ghost_domain::{
    Error, ErrorCode, EventKind, MacAddress, NetworkName, Principal, Result, Role, VmId,
};

use super::GuestTarget;
use super::detail::escape;
use super::door::{Door, failed};
use crate::registry::{Decision, Model, is_usable};

/// Registers an address of a VM, for guests without agent and without DHCP.
pub struct RegisterGuestAddress {
    pub(crate) door: Arc<Door>,
}

impl RegisterGuestAddress {
    /// Takes the address for the card on whose network it lies, in the place of what was
    /// registered for that card before; `None` forgets all that was registered for the VM. It is
    /// kept with the VM's record, and counts while the VM runs and neither the guest nor a lease
    /// says otherwise.
    ///
    /// # Errors
    /// `PermissionDenied`, `VmNotFound`, `VmNotRunning`; `InvalidArgument` for an address that is
    /// neither leased to the VM nor in the subnet of one of its networks, that is the host's or a
    /// special one, or that another VM has; `NetworkFailed`, `HypervisorUnavailable`.
    pub async fn execute(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        address: Option<IpAddr>,
    ) -> Result<()> {
        let address = address.map(|address| address.to_canonical());
        let door = &self.door;
        let mut record = AuditRecord {
            principal: escape(&principal.name, 256),
            action: "address".into(),
            vm_name: escape(&target.vm, 128),
            detail: address.map_or_else(|| "none".to_owned(), |address| address.to_string()),
            request_id: escape(&target.request_id, 128),
            ..AuditRecord::default()
        };
        let outcome = self.register(principal, target, address, &mut record).await;
        match &outcome {
            Ok(()) => {
                record.outcome = "ok".into();
                door.write_later(record);
            }
            Err(error) => {
                record.outcome = failed(error);
                door.write_refusal(record);
            }
        }
        outcome
    }

    async fn register(
        &self,
        principal: &Principal,
        target: &GuestTarget,
        address: Option<IpAddr>,
        record: &mut AuditRecord,
    ) -> Result<()> {
        principal.require(Role::Operator)?;
        let door = &self.door;
        let (id, name, cards) = door.registry.read(|model| {
            let entry = model.find_vm(&target.vm)?;
            if address.is_some() {
                super::door::check_power(model, entry.vm.id)?;
            }
            let cards: Vec<(MacAddress, NetworkName)> = entry
                .vm
                .spec
                .interfaces
                .iter()
                .map(|card| (card.mac, card.network.clone()))
                .collect();
            Ok::<_, Error>((entry.vm.id, entry.vm.name.to_string(), cards))
        })?;
        record.vm_id = id.to_string();
        record.vm_name.clone_from(&name);
        let Some(address) = address else {
            return self.keep(id, name, |_, _| Ok(Vec::new())).await;
        };
        if !is_usable(address) {
            return Err(refuse(
                address,
                "it is no address of a machine on a network",
            ));
        }
        let mac = self.card_of(address, &cards).await?;
        self.keep(id, name, move |model, vm| {
            let taken = model.vms.values().find(|other| {
                let registered = other.vm.registered_addresses.iter();
                other.vm.id != id
                    && (registered
                        .map(|(_, known)| *known)
                        .any(|known| known == address)
                        || other
                            .known_addresses()
                            .iter()
                            .any(|known| known.address == address))
            });
            if let Some(other) = taken {
                return Err(refuse(address, &format!("{} has it", other.vm.name)));
            }
            let others = vm.registered_addresses.iter().copied();
            Ok(others
                .filter(|(of, _)| *of != mac)
                .chain([(mac, address)])
                .collect())
        })
        .await
    }

    /// Records what is registered for a VM from now on. The domain has no part in it, so that the
    /// generation stays.
    async fn keep(
        &self,
        id: VmId,
        name: String,
        decide: impl FnOnce(&Model, &Vm) -> Result<Vec<(MacAddress, IpAddr)>> + Send + 'static,
    ) -> Result<()> {
        self.door
            .registry
            .transact(move |model| {
                model.check_accepting()?;
                let mut vm = Vm::clone(&model.vm(id)?.vm);
                vm.registered_addresses = decide(model, &vm)?;
                let changes = vec![Change::PutVm(Box::new(vm))];
                Ok(Decision::of((), changes).notice(EventKind::VmUpdated, Some(id), name))
            })
            .await
    }

    /// The card whose lease or network the address fits.
    async fn card_of(
        &self,
        address: IpAddr,
        cards: &[(MacAddress, NetworkName)],
    ) -> Result<MacAddress> {
        let networks = self.door.ports.networks.list().await?;
        for (mac, network) in cards {
            let leases = self.door.ports.networks.leases(network).await?;
            if let Some(lease) = leases.iter().find(|lease| lease.address == address) {
                if lease.mac == *mac {
                    return Ok(*mac);
                }
                return Err(refuse(address, "it is leased to another card"));
            }
            let subnet = networks
                .iter()
                .find(|one| one.name == *network)
                .and_then(|one| one.subnet.as_deref())
                .and_then(Subnet::parse);
            if let Some(subnet) = subnet
                && subnet.contains(address)
            {
                subnet.check_host(address)?;
                return Ok(*mac);
            }
        }
        Err(refuse(
            address,
            "it is neither leased to the VM nor in the subnet of one of its networks",
        ))
    }
}

fn refuse(address: IpAddr, why: &str) -> Error {
    Error::new(
        ErrorCode::InvalidArgument,
        format!("{address} cannot be registered"),
    )
    .because(why)
    .hint("see the networks: ghostctl network list")
    .field("address", why)
}

/// A network in CIDR form (RFC 4632). libvirt gives the host the first address of the ones that
/// Ghost makes, and writes a network by the host's address in it.
struct Subnet {
    base: u128,
    written: u128,
    host_bits: u32,
    v4: bool,
}

impl Subnet {
    fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        let prefix: u32 = prefix.parse().ok()?;
        let v4 = address.is_ipv4();
        let bits: u32 = if v4 { 32 } else { 128 };
        let host_bits = bits.checked_sub(prefix)?;
        let written = number(address);
        Some(Self {
            base: written & !mask(host_bits),
            written,
            host_bits,
            v4,
        })
    }

    fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.v4 && number(address) & !mask(self.host_bits) == self.base
    }

    /// Neither the network's own address, its broadcast address, nor the host's.
    fn check_host(&self, address: IpAddr) -> Result<()> {
        let number = number(address);
        let last = self.base | mask(self.host_bits);
        let reserved = number == self.base
            || number == self.base + 1
            || number == self.written
            || (self.v4 && number == last);
        if reserved {
            return Err(refuse(
                address,
                "it is the host's or stands for the whole network",
            ));
        }
        Ok(())
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

fn mask(bits: u32) -> u128 {
    1u128.checked_shl(bits).map_or(u128::MAX, |one| one - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_hold_what_lies_in_them_and_spare_the_hosts_addresses() {
        let subnet = Subnet::parse("10.113.0.0/24").unwrap();
        let at = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(subnet.contains(at("10.113.0.7")) && subnet.check_host(at("10.113.0.7")).is_ok());
        assert!(!subnet.contains(at("10.113.1.7")));
        assert!(!subnet.contains(at("::ffff:10.113.0.7")), "not canonical");
        for reserved in ["10.113.0.0", "10.113.0.1", "10.113.0.255"] {
            assert!(subnet.check_host(at(reserved)).is_err(), "{reserved}");
        }
        let written = Subnet::parse("10.1.2.9/24").unwrap();
        assert!(written.contains(at("10.1.2.3")) && written.check_host(at("10.1.2.9")).is_err());
        let v6 = Subnet::parse("fd00::/64").unwrap();
        assert!(v6.contains(at("fd00::5")) && !v6.contains(at("fd01::5")));
        assert!(Subnet::parse("0.0.0.0/0").unwrap().contains(at("1.2.3.4")));
        for bad in ["", "10.0.0.0", "10.0.0.0/33", "x/8"] {
            assert!(Subnet::parse(bad).is_none(), "{bad}");
        }
    }
}
